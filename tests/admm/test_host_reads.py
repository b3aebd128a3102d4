"""Steps and projections on tensors that have a device and no values: whatever asks for one is counted, or raises."""

import contextlib

import pytest
import torch
from torch import nn

from benchmarks import kernel_count
from benchmarks.fake_cuda import Kernels, can_fake_cuda, fake_cuda
from benchmarks.kernel_count import CASES, Counting
from elsa_modifier.admm import ADMMOptimizer, PenaltySchedule, PrunedWeight, SharedBudget
from elsa_modifier.training.base_optimizer import build_base_optimizer
from elsa_modifier.training.late import LateReads

pytestmark = pytest.mark.skipif(not can_fake_cuda(), reason="neither a torch with CUDA nor a C++ compiler")


@pytest.fixture
def counting(monkeypatch):
    """A context on fake devices in which updates run uncompiled, and reads are counted."""
    monkeypatch.setattr(kernel_count, "written_kernels", lambda *arguments: Kernels("", ["k"], 0))
    monkeypatch.setattr(kernel_count, "_kernels", {})
    with fake_cuda() as mode, kernel_count.counted(mode) as found:
        yield found


def optimizer_of(case, shapes=((64, 96), (10, 33))):
    shapes = [shape for shape in shapes if case.structure.is_unstructured or shape[1] % case.structure.group == 0]
    weights = [nn.Parameter(torch.empty(shape, dtype=case.dtype, device="cuda")) for shape in shapes]
    base = build_base_optimizer(case.optimizer, weights, lr=1e-3, betas=(0.9, 0.999), seed=0)
    pruned = [PrunedWeight(f"w{i}", w, w.numel() // 2, case.structure) for i, w in enumerate(weights)]
    optimizer = ADMMOptimizer(
        base,
        pruned,
        penalty=PenaltySchedule(0.3, "cosine", 9),
        form=case.form,
        dual=case.dual,
        interval=4,
        freeze_step=7,
        state_dtype=case.state,
        budget=SharedBudget(0.0, 0.99) if case.structure.is_unstructured else None,
    )
    # Whether a first gradient is more than zeros has to be asked once.
    optimizer._reached = {id(w) for w in weights}
    return optimizer, weights


@pytest.mark.parametrize("case", CASES, ids=[case.title for case in CASES])
def test_a_step_reads_nothing_and_a_projection_once(case, counting):
    optimizer, weights = optimizer_of(case)
    ok = torch.ones((), dtype=torch.bool, device="cuda")
    reads = []
    for _ in range(9):
        for weight in weights:
            weight.grad = torch.empty_like(weight)
            optimizer.mask_gradient_(weight)
        counting.reads = 0
        optimizer.step(ok)
        reads.append(counting.reads)
    # Projections come after the first step, the fifth and, when the mask is fixed, the seventh.
    assert reads == [1, 0, 0, 0, 1, 0, 1, 0, 0]


def test_whatever_reads_is_counted():
    with fake_cuda(), Counting() as counting:
        numbers = torch.ones(3, device="cuda")
        for number, read in enumerate([numbers.sum().item, numbers.tolist, numbers.cpu, numbers.nonzero], start=1):
            with contextlib.suppress(Exception):  # there is no value
                read()
            assert counting.reads >= number
        assert counting.kernels == 2  # ones, and their sum


def test_losses_are_read_two_steps_later(monkeypatch):
    from elsa_modifier.admm import placement
    from elsa_modifier.training import late

    monkeypatch.setattr(placement, "_EAGER", set())
    waited = []

    class Copied:
        def __init__(self, number):
            self.number = number

        def synchronize(self):
            waited.append(self.number)

    monkeypatch.setattr(late, "start_copy", lambda numbers: (numbers, Copied(float(numbers[0]))))
    reads, told = LateReads(torch.device("cpu")), []
    for step in range(5):
        reads.read(torch.tensor([float(step)]), told.append)
        assert told == [[float(s)] for s in range(step - 1)]
    reads.finish()
    assert waited == [0.0, 1.0, 2.0, 3.0, 4.0] and told == [[float(s)] for s in range(5)]


def test_the_host_reads_its_own_memory_at_once():
    reads, told = LateReads(torch.device("cpu")), []
    reads.read(torch.tensor([2.0, 3.0]), told.append)
    assert told == [[2.0, 3.0]] and not reads.is_late


def test_devices_that_are_mixed_up_are_noticed(counting):
    optimizer, weights = optimizer_of(CASES[0], shapes=((64, 96),))
    weights[0].grad = torch.empty_like(weights[0])
    optimizer.states[0]._bits = torch.zeros(optimizer.states[0].bits.shape, dtype=torch.uint8)
    with pytest.raises(Exception, match=r"cuda:0.*cpu|cpu.*cuda:0"):
        optimizer.step()
