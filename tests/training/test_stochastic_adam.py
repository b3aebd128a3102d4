import bisect

import pytest
import torch

from elsa_modifier.training.stochastic_adam import FirstMoment, SecondMoment, StochasticAdam, moment_block
from tests.reference.admm import stored
from tests.reference.moments import adam, second_moment_values

VALUES = second_moment_values()


def _stored(moment_class, values):
    moment = moment_class(values)
    moment.quantize_(values)
    return moment.dequantize()


def test_values_of_the_format_are_kept():
    values = torch.tensor(VALUES)
    assert values[1] < 2.0**-31
    for scale in (1.0, 2.0**-60, 2.0**40):
        assert torch.equal(_stored(SecondMoment, values * scale), values * scale)


def test_others_round_to_a_neighbour():
    torch.manual_seed(0)
    # The largest of each block is 1.
    values = torch.cat([torch.ones(1, 40), torch.exp(-8 * torch.rand(255, 40))]).T.flatten()
    for value, found in zip(values.tolist(), _stored(SecondMoment, values).tolist(), strict=True):
        above = bisect.bisect_left(VALUES, value)
        assert found in VALUES[above - 1 : above + 1]


@pytest.mark.parametrize("value", [0.07, 0.2, 0.9999, 1e-4, 3e-9])
def test_the_expectation_is_the_value(value):
    torch.manual_seed(0)
    values = torch.full((1 << 20,), value)
    values[::256] = 1.0
    found = _stored(SecondMoment, values)[torch.arange(len(values)) % 256 != 0].double()
    unit = float(found.max() - found.min())
    assert unit > 0
    assert abs(float(found.mean()) - float(torch.tensor(value))) < 0.003 * unit


def test_only_zero_is_zero():
    """Not even what vanishes when it is divided by its block's largest."""
    values = torch.zeros(600)
    assert torch.equal(_stored(SecondMoment, values), values)
    assert torch.equal(_stored(FirstMoment, values), values)
    values[0], values[1], values[2], values[300] = 1e20, 1e8, 1e-38, 1e-42
    found = _stored(SecondMoment, values)
    assert torch.equal(found > 0, values > 0)
    assert found[1] == found[2] == 1e20 * torch.tensor(VALUES[1])
    assert bool(_stored(FirstMoment, -values).isfinite().all())


def _largest_step(gradients):
    """In multiples of the learning rate, of any weight in any step."""
    weight = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = StochasticAdam([weight], lr=1.0)
    largest = 0.0
    for gradient in gradients:
        weight.data.zero_()
        weight.grad = gradient
        optimizer.step()
        largest = max(largest, float(weight.detach().abs().max()))
    return largest


@pytest.mark.parametrize("width", [576, 256, 40])  # blocks of 64, of a row, and across rows
@pytest.mark.parametrize("orders", [0, 12, 24, 40])
def test_no_step_is_larger_than_adams_bound(width, orders):
    """Rows of an embedding whose gradients lie orders of magnitude apart, some of them zero most of the time."""
    torch.manual_seed(0)
    rows = torch.exp2(-orders * torch.rand(48, 1))
    rows[::5] = 1.0
    seen = torch.rand(60, 48, 1) < torch.where(torch.arange(48)[:, None] % 3 == 0, 0.1, 1.0)
    bound = 0.1 / 0.001**0.5 / (1 - 0.9**2 / 0.999) ** 0.5
    gradients = [1e3 * rows * now * torch.randn(48, width) for now in seen]
    assert 0.5 < _largest_step(gradients) < bound


def test_a_first_moment_that_fails_to_decay_is_outweighed():
    """It is rounded to the nearest of steps that its decay is less than half of; the second moment goes on decaying."""
    gradients = [torch.zeros(1, 64) for _ in range(400)]
    for gradient in gradients:
        gradient[0, 0] = 1.0
    gradients[0][0, 1:] = torch.logspace(-7, 0, 63)
    weight = torch.nn.Parameter(torch.zeros(1, 64))
    optimizer = StochasticAdam([weight], lr=1.0)
    for gradient in gradients:
        weight.data.zero_()
        weight.grad = gradient
        optimizer.step()
    assert bool(optimizer.state[weight]["exp_avg"].dequantize()[0, 1:].any())
    assert float(weight.detach()[0, 1:].abs().max()) < 1.5


def test_rows_share_no_scale():
    """One of an embedding's rows is not rounded by what another, of a frequent token, needs."""
    values = torch.full((4, 576), 2.0**-40)
    values[1] = 1.0
    assert torch.equal(_stored(SecondMoment, values.clone()), values)
    assert torch.equal(_stored(FirstMoment, values.clone()), values)
    assert [moment_block(shape) for shape in [(9, 4096), (9, 576), (9, 96), (9, 48), (9, 77), (4096,), (2, 9, 64)]] == [
        256, 64, 32, 256, 256, 256, 64,
    ]  # fmt: skip


@pytest.mark.parametrize("entries", [1, 255, 256, 257, 70_000, 600_001])
def test_the_first_moment_is_rounded_to_the_nearest(entries):
    torch.manual_seed(0)
    values = torch.randn(entries) * torch.logspace(-9, 3, entries)
    agree = torch.isclose(_stored(FirstMoment, values), stored(values, "float8_e4m3fn"), rtol=1e-6, atol=0)
    # One that lies half-way may go either way.
    assert int((~agree).sum()) <= entries / 10_000


def test_steps_are_adams():
    """Within what 8 bits lose: 3 bits of mantissa are half a step of 6% of a first moment, one of 12% of a second."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(40, 77))
    spread = torch.logspace(-4, 0, 77)
    gradients = [torch.randn(40, 77) * spread + spread for _ in range(50)]
    optimizer = StochasticAdam([weight], lr=1e-2, betas=(0.9, 0.999))
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    exact, _ = adam(torch.zeros(40, 77), gradients, 1e-2, (0.9, 0.999))
    ratio = weight.detach() / exact
    assert abs(float(ratio.mean()) - 1) < 0.01
    assert float(ratio.std()) < 0.1


def test_one_step_is_exact():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(300))
    gradient, before = torch.randn(300), weight.detach().clone()
    optimizer = StochasticAdam([weight], lr=1e-2)
    weight.grad = gradient
    optimizer.step()
    torch.testing.assert_close(weight.detach().double(), adam(before, [gradient], 1e-2, (0.9, 0.999))[0])


@pytest.mark.parametrize("scale", [0.3, 1e-3])
def test_a_second_moment_follows_changes_too_small_for_its_format(scale):
    """Entries whose gradients begin late grow beside others, soon by less than half of their last place in a step."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(4096))
    late = torch.arange(4096) % 256 != 0
    gradients = [torch.where(late, scale if step >= 100 else 0.0, 1.0) for step in range(500)]
    _, exact = adam(weight, gradients, 0.0, (0.9, 0.999))
    optimizer = StochasticAdam([weight], lr=0.0)
    nearest = torch.zeros(4096)
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
        nearest = stored(nearest.lerp(gradient.square(), 0.001), "float8_e4m3fn")
    ratio = (optimizer.state[weight]["exp_avg_sq"].dequantize() / exact)[late]
    assert float(ratio.mean()) == pytest.approx(1, abs=0.02)
    assert 0.02 < float(ratio.std()) < 0.25
    assert float((nearest / exact)[late].max()) < 0.3


def test_bytes():
    weight = torch.nn.Parameter(torch.randn(64, 512, dtype=torch.bfloat16))
    weight.grad = torch.randn_like(weight)
    optimizer = StochasticAdam([weight], lr=1e-3)
    optimizer.step()
    moments = [optimizer.state[weight][key] for key in ("exp_avg", "exp_avg_sq")]
    assert sum(m.codes.nbytes + m.scale.nbytes for m in moments) == 2 * (1 + 4 / 256) * weight.numel()


def test_a_closure_is_refused():
    with pytest.raises(ValueError, match="closure is not supported"):
        StochasticAdam([torch.nn.Parameter(torch.ones(2))], lr=1.0).step(lambda: 0.0)
