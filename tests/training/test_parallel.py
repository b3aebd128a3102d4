"""The parts of a run on several ranks that one process can look at."""

import pytest
import torch
from torch import nn

from elsa_modifier import ELSAModifier
from elsa_modifier.admm.rounding import Place, keyed_int16
from elsa_modifier.preflight import refuse_on_ranks
from elsa_modifier.saving import extend_save_pretrained
from elsa_modifier.training.data import IGNORED_LABEL
from elsa_modifier.training.loading import is_placeholder, load_for_ranks
from elsa_modifier.training.objective import count_targets, next_token_loss
from elsa_modifier.training.parallel import own_part
from elsa_modifier.training.ranks import is_first_process, launched_ranks
from elsa_modifier.training.stochastic_adam import StochasticAdam

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


def test_ranks_are_those_that_can_find_each_other():
    assert launched_ranks({}) == 1
    assert launched_ranks(TORCHRUN) == 4
    assert launched_ranks(TORCHRUN | {"MASTER_ADDR": ""}) == 1
    assert not is_first_process(TORCHRUN)
    assert is_first_process(TORCHRUN | {"RANK": "0"}) and is_first_process({"RANK": "1"})


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_parts_are_the_batch(rows, count):
    batch = {
        "input_ids": torch.arange(rows * 3).view(rows, 3),
        "labels": torch.arange(rows * 3).view(rows, 3),
        "scale": torch.ones(()),
        "positions": torch.arange(3 + rows),
    }
    parts = [own_part(batch, rank, count) for rank in range(count)]
    busy = [part for part in parts if (part["labels"] != IGNORED_LABEL).any()]
    assert len(busy) == min(rows, count)
    assert torch.equal(torch.cat([part["input_ids"] for part in busy]), batch["input_ids"])
    assert torch.equal(torch.cat([part["labels"] for part in busy]), batch["labels"])
    assert sum(count_targets(part["labels"]) for part in parts) == count_targets(batch["labels"])
    assert all(len(part["input_ids"]) for part in parts)
    assert all(torch.equal(part[key], batch[key]) for part in parts for key in ("scale", "positions"))


def test_a_rank_without_rows_has_no_gradient(load):
    model = load()
    batch = {"input_ids": torch.arange(8).view(1, 8), "labels": torch.arange(8).view(1, 8)}
    loss = next_token_loss(model, own_part(batch, 0, 2))
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(not p.grad.any() for p in model.parameters())


def test_noise_is_a_function_of_the_entry():
    whole = Place(3, 0, 200_000)
    device = torch.device("cpu")
    noise = keyed_int16((1, 2, 0), whole, 0, 200_000, device)
    for first, end in ((0, 1), (65_535, 65_537), (70_000, 200_000), (131_072, 140_000)):
        assert torch.equal(keyed_int16((1, 2, 0), whole, first, end, device), noise[first:end])
        part = Place(3, first, 200_000)
        assert torch.equal(keyed_int16((1, 2, 0), part, 0, end - first, device), noise[first:end])
    for key, place in (((0, 2, 0), whole), ((1, 3, 0), whole), ((1, 2, 1), whole), ((1, 2, 0), Place(4, 0, 200_000))):
        other = keyed_int16(key, place, 0, 200_000, device)
        assert float((other == noise).float().mean()) < 1e-3
    # Uniform over all of int16.
    assert abs(float(noise.double().mean())) < 4 * 2**16 / (12 * 200_000) ** 0.5
    assert noise.min() < -32_000 and noise.max() > 32_000


def test_rows_are_rounded_alike_whoever_has_them():
    torch.manual_seed(0)
    whole = nn.Parameter(torch.randn(8, 256).bfloat16())
    # On two ranks, the second of which has the last three rows.
    parts = [nn.Parameter(whole[:5].detach().clone()), nn.Parameter(whole[5:].detach().clone())]
    optimizers = [
        StochasticAdam([p], lr=1e-3, seed=5, places=[Place(0, offset, 2048)])
        for p, offset in ((whole, 0), (parts[0], 0), (parts[1], 5 * 256))
    ]
    for _ in range(4):
        gradient = torch.randn(8, 256).bfloat16()
        for p, g in zip((whole, *parts), (gradient, gradient[:5], gradient[5:]), strict=True):
            p.grad = g.clone()
        torch.manual_seed(int(gradient.view(torch.int16)[0, 0]))  # what torch's generator draws is not looked at
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(torch.cat([p.detach() for p in parts]), whole.detach())
    second = [o.state[p]["exp_avg_sq"].dequantize() for o, p in zip(optimizers, (whole, *parts), strict=True)]
    assert torch.equal(torch.cat(second[1:]), second[0])


def test_only_the_first_rank_loads_values(checkpoint, monkeypatch):
    first = load_for_ranks(checkpoint("llama-tied"))
    assert not any(map(is_placeholder, first.parameters()))
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    other = load_for_ranks(checkpoint("llama-tied"))
    assert all(map(is_placeholder, other.parameters()))
    assert [(n, p.shape) for n, p in other.named_parameters()] == [(n, p.shape) for n, p in first.named_parameters()]
    assert sum(p.untyped_storage().nbytes() for p in other.parameters()) < 1000
    assert [b.shape for b in other.buffers()] == [b.shape for b in first.buffers()]


def test_what_ranks_cannot_do_is_refused():
    elsa = ELSAModifier(sparsity=0.5)
    refuse_on_ranks([elsa], whole_gradients_released=False, offloaded=False, ranks=4)
    refuse_on_ranks([elsa, object()], whole_gradients_released=True, offloaded=True, ranks=1)
    with pytest.raises(ValueError, match="the recipe has ELSAModifier, object, and there are 2 processes"):
        refuse_on_ranks([elsa, object()], whole_gradients_released=False, offloaded=False, ranks=2)
    with pytest.raises(ValueError, match="offload_state is true, and there are 2"):
        refuse_on_ranks([elsa], whole_gradients_released=False, offloaded=True, ranks=2)
    with pytest.raises(ValueError, match="gradient_release is true, parallel 'ddp', and there are 2 processes"):
        refuse_on_ranks([elsa], whole_gradients_released=True, offloaded=False, ranks=2)


def test_other_ranks_do_not_save(load, tmp_path):
    model = load()
    extend_save_pretrained(model, history="", checkpoint="dense", experts={}, first=False)
    model.save_pretrained(tmp_path / "out", save_compressed=True)
    assert not (tmp_path / "out").exists()
