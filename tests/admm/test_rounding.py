import torch

from elsa_modifier.admm.rounding import round_stochastically_


def _rounded(values):
    target = torch.empty(values.shape, dtype=torch.bfloat16)
    round_stochastically_(target, values.clone())
    return target


def test_the_expectation_is_the_value():
    torch.manual_seed(0)
    for value in (1.0 + 2**-10, -3.1415927, 1e-20, 0.999):
        values = torch.full((1_000_001,), value)
        rounded = _rounded(values).double()
        assert len(rounded.unique()) == 2
        unit = float(rounded.max() - rounded.min())
        assert abs(float(rounded.mean()) - value) < 0.003 * unit


def test_results_are_the_neighbours():
    torch.manual_seed(0)
    values = torch.randn(10_000)
    rounded = _rounded(values).float()
    nearest = values.bfloat16().float()
    unit = 2.0 ** (torch.floor(torch.log2(values.abs())) - 7)
    assert bool(((rounded - values).abs() < unit).all())
    assert 0.2 < float((rounded != nearest).float().mean()) < 0.3


def test_what_bf16_holds_is_left_alone():
    values = torch.cat([torch.randn(999).bfloat16().float(), torch.tensor([0.0, -0.0, 1.0])])
    assert all(torch.equal(_rounded(values).float(), values) for _ in range(5))


def test_the_same_seed_rounds_the_same():
    values = torch.randn(1001)
    torch.manual_seed(3)
    first = _rounded(values)
    torch.manual_seed(3)
    assert torch.equal(first, _rounded(values))
