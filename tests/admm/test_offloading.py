"""States that are kept elsewhere between uses: the same bits, and copies that wait for what they have to wait for."""

import random

import pytest
import torch
from torch import nn

from elsa_modifier.admm.budget import SharedBudget
from elsa_modifier.admm.constraint import PrunedWeight
from elsa_modifier.admm.offloading import Lanes, MovedState
from elsa_modifier.training.stochastic_adam import StochasticAdam
from tests.admm.test_fused import DENSE, fuse, tightening  # noqa: F401


def run(adam, *, dtype, **options):
    torch.manual_seed(0)
    shapes = [(48, 64), (33, 20), (16,), (3, 4)]
    parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    pruned = [PrunedWeight(f"w{i}", p, p.numel() // 3, DENSE) for i, p in enumerate(parameters) if p.ndim > 1]
    optimizer = tightening(adam(parameters), pruned, budget=SharedBudget(0.2, 0.9), **options)
    for step in range(12):
        for i, parameter in enumerate(parameters):
            parameter.grad = torch.randn(parameter.shape).to(dtype)
            if i == 1 and step % 3 == 1:
                parameter.grad = None
            optimizer.mask_gradient_(parameter)
        optimizer.step()
    optimizer.kept.synchronize()
    return parameters, optimizer


def kept_tensors(optimizer, parameters):
    return [t for p in parameters for holder in optimizer.kept._holders(p) for t in holder.held()]


ADAMS = [lambda p: torch.optim.Adam(p, lr=0.05, fused=True), lambda p: StochasticAdam(p, lr=0.05, seed=3)]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("adam", ADAMS, ids=["adam", "adam8bit_sr"])
@pytest.mark.parametrize(
    "form,dual,state_dtype", [("decoupled", False, "fp32"), ("decoupled", True, "int8"), ("coupled", True, "fp32")]
)
def test_the_same_bits(adam, form, dual, state_dtype, fused, fuse):  # noqa: F811
    if fused:
        fuse()
    dtype = torch.bfloat16 if adam is ADAMS[1] and form == "decoupled" else torch.float32
    options = {"form": form, "dual": dual, "state_dtype": state_dtype, "dtype": dtype}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("elsa_modifier.admm.offloading.is_fused", lambda device: False)  # main memory has no streams
        expected, there = run(adam, offload=False, **options)
        found, away = run(adam, offload=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(m, there.masks[n]) for n, m in away.masks.items())
    pairs = list(zip(kept_tensors(away, found), kept_tensors(there, expected), strict=True))
    assert len(pairs) >= 8 and all(torch.equal(a.float(), b.float()) for a, b in pairs)
    # Two rooms that hold the largest, whatever there is in all.
    of_each = [sum(t.nbytes for h in away.kept._holders(p) for t in h.held()) for p in found]
    rooms = [room.buffer.nbytes for room in away.kept._moved._rooms]
    assert max(rooms) < max(of_each) + 256 * 6 and sum(of_each) > 0


class Place:
    """Holds a tensor, and says where it is."""

    def __init__(self, entries):
        self.tensor = torch.zeros(entries)

    def held(self):
        return [self.tensor]

    def hold(self, tensors):
        (self.tensor,) = tensors


class AnyOrder(Lanes):
    """Streams in which nothing happens before somebody waits, and then in any order that events allow."""

    def __init__(self, seed):
        self.queues = {"up": [], "down": [], "compute": []}
        self.random = random.Random(seed)
        self.done = set()
        self.events = 0

    def ask(self, queue, action, after=()):
        self.events += 1
        self.queues[queue].append((self.events, action, [event for event in after if event is not None]))
        return self.events

    def advance(self):
        """Do one thing of a stream that may go on."""
        ready = [q for q in self.queues.values() if q and all(event in self.done for event in q[0][2])]
        event, action, _ = self.random.choice(ready).pop(0)
        action()
        self.done.add(event)

    def finish(self, event):
        while event is not None and event not in self.done:
            self.advance()

    def copies(self, queue, pairs, after):
        pairs = list(pairs)
        return self.ask(queue, lambda: [to.copy_(source) for to, source in pairs], after)

    def up(self, pairs, *after):
        return self.copies("up", pairs, after)

    def down(self, pairs, *after):
        return self.copies("down", pairs, after)

    def along(self, pairs):
        return self.copies("compute", pairs, ())

    def event(self):
        return self.ask("compute", lambda: None)

    def wait(self, event):
        self.ask("compute", lambda: None, [event])

    def empty(self, nbytes):
        # An allocator gives memory away that kernels asked for earlier may still write to.
        memory = torch.empty(nbytes, dtype=torch.uint8)
        self.ask("compute", lambda: memory.fill_(0x7F))
        return memory

    def empty_home(self, tensor):
        return torch.full_like(tensor, float("nan"))


@pytest.mark.parametrize("seed", range(60))
def test_copies_wait_for_what_they_have_to(seed):
    choose = random.Random(seed)
    lanes = AnyOrder(seed)
    places = [Place(choose.choice([3, 64, 200])) for _ in range(choose.choice([1, 2, 3, 5]))]
    expected = [torch.zeros_like(place.tensor) for place in places]
    weights = [torch.zeros(1) for _ in places]
    of = {id(weight): place for weight, place in zip(weights, places, strict=True)}
    moved = MovedState(lambda weight: [of[id(weight)]], lanes)
    read = []
    order = list(range(len(places)))
    for step in range(6):
        if choose.random() < 0.3:
            choose.shuffle(order)
        for i in order:
            changed = choose.random() < 0.7
            with moved.here(weights[i], changed=changed):
                tensor = places[i].tensor
                if changed:
                    lanes.ask("compute", lambda t=tensor, n=1.0 + i + step: t.mul_(1.5).add_(n))
                    expected[i].mul_(1.5).add_(1.0 + i + step)
                else:
                    wanted = expected[i].clone()
                    lanes.ask("compute", lambda t=tensor, wanted=wanted: read.append(t.equal(wanted)))
        if choose.random() < 0.3:
            # What a checkpoint does: read what is kept, and write it.
            moved.synchronize()
            for place, wanted in zip(places, expected, strict=True):
                assert torch.equal(place.tensor, wanted)
                place.tensor.add_(1.0)
                wanted.add_(1.0)
    moved.synchronize()
    lanes.finish(lanes.event())
    assert all(torch.equal(place.tensor, wanted) for place, wanted in zip(places, expected, strict=True))
    assert all(read)


def test_what_is_new_is_moved_off():
    lanes = AnyOrder(0)
    place, weight = Place(0), torch.zeros(1)
    moved = MovedState(lambda _: [place] if place.tensor.numel() else [], lanes)
    with moved.here(weight, changed=False):
        place.tensor = made = torch.ones(5)
    assert place.tensor is not made
    with moved.here(weight, changed=False):
        here = place.tensor
    assert here is not place.tensor
    moved.synchronize()
    assert torch.equal(place.tensor, torch.ones(5))


def test_the_next_one_is_brought_while_one_is_computed_with():
    lanes = AnyOrder(0)
    places = [Place(4) for _ in range(3)]
    weights = [torch.zeros(1) for _ in places]
    of = {id(weight): place for weight, place in zip(weights, places, strict=True)}
    moved = MovedState(lambda weight: [of[id(weight)]], lanes)
    asked = []
    for _ in range(3):
        for weight in weights:
            with moved.here(weight, changed=True):
                asked.append(len(lanes.queues["up"]))
    # Once the order is known, one copy a weight, asked for a weight ahead.
    assert asked[4:] == list(range(asked[4], asked[4] + 5))
    assert moved._rooms[0].weight is weights[0] or moved._rooms[1].weight is weights[0]
