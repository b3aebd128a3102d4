"""Sums over rows in chunks against the same function of all rows, differentiated by autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from elsa_modifier.training.chunks import sum_in_chunks

ROWS, WIDTH, WORDS = 23, 8, 50


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS, WIDTH, generator=generator, requires_grad=True)
    targets = torch.randint(0, WORDS, (ROWS,), generator=generator)
    head = nn.Linear(WIDTH, WORDS)
    with torch.no_grad():
        head.weight.normal_(generator=generator)
        head.bias.normal_(generator=generator)
    return rows, targets, head


def gradients(loss, *tensors):
    return torch.autograd.grad(3.0 * loss, tensors, allow_unused=True)


@pytest.mark.parametrize("size", [1, 4, 22, 23, 100])
@pytest.mark.parametrize("autocast", [False, True])
def test_value_and_gradients(problem, size, autocast):
    rows, targets, head = problem

    def loss_of(part, labels):
        return F.cross_entropy(head(part).float(), labels, reduction="sum")

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        # What is kept of a cast is used by several chunks.
        expected, ours = loss_of(rows, targets), sum_in_chunks(loss_of, rows, targets, size=size)
    torch.testing.assert_close(ours, expected)
    wanted = gradients(expected, rows, head.weight, head.bias)
    for a, b in zip(gradients(ours, rows, head.weight, head.bias), wanted, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= (1e-2 if autocast else 1e-6) * b.norm()


def test_bf16_gradients_are_added_up_in_fp32(problem):
    _, _, head = problem
    # Many, so that it shows what they are added up in.
    generator = torch.Generator().manual_seed(1)
    rows, head = torch.randn(400, WIDTH, generator=generator).bfloat16(), head.bfloat16()
    targets = torch.randint(0, WORDS, (400,), generator=generator)
    exact_head = copy.deepcopy(head).float()

    def loss_of(part, labels):
        return F.cross_entropy(head(part).float(), labels, reduction="sum")

    (whole,) = gradients(loss_of(rows, targets), head.weight)
    (ours,) = gradients(sum_in_chunks(loss_of, rows, targets, size=1), head.weight)
    (exact,) = gradients(F.cross_entropy(exact_head(rows.float()), targets, reduction="sum"), exact_head.weight)
    assert ours.dtype == torch.bfloat16
    in_bf16 = torch.zeros_like(whole)
    for row, target in zip(rows.split(1), targets.split(1), strict=True):
        in_bf16 += gradients(loss_of(row, target), head.weight)[0]
    off, off_whole, off_in_bf16 = ((found - exact).norm() for found in (ours, whole, in_bf16))
    # About as from one product, whose roundings are others from machine to machine.
    assert off < 1.5 * off_whole and off < 0.3 * off_in_bf16, (off, off_whole, off_in_bf16)


def test_parameters_meet_hooks_and_their_other_uses(problem):
    rows, targets, head = problem
    complete = []
    head.weight.register_post_accumulate_grad_hook(lambda p: complete.append(p.grad.clone()))

    def loss_of(part, labels):
        return F.cross_entropy(head(part), labels, reduction="sum")

    def tied(loss):
        return loss + head.weight[targets].square().sum()

    tied(loss_of(rows, targets)).backward()
    head.weight.grad = None
    tied(sum_in_chunks(loss_of, rows, targets, size=5)).backward()
    expected, ours = complete  # each once, and whole
    torch.testing.assert_close(ours, expected)


def test_what_is_frozen_or_aligned_gets_no_gradient(problem):
    rows, _, head = problem
    head.bias.requires_grad_(False)
    teacher = torch.randn(ROWS, WIDTH, requires_grad=True)

    def loss_of(part, other):
        return F.kl_div(head(part).log_softmax(-1), head(other).log_softmax(-1), log_target=True, reduction="sum")

    with torch.no_grad():
        fixed = teacher.clone()
    loss_of(rows, fixed).backward()
    expected = rows.grad
    rows.grad = None
    sum_in_chunks(loss_of, rows, fixed, size=7).backward()
    torch.testing.assert_close(rows.grad, expected)
    assert teacher.grad is None and head.bias.grad is None


def test_without_gradients(problem):
    rows, targets, head = problem
    sizes = []

    def loss_of(part, labels):
        sizes.append(len(part))
        return F.cross_entropy(head(part), labels, reduction="sum")

    with torch.no_grad():
        ours = sum_in_chunks(loss_of, rows, targets, size=10)
    assert sizes == [10, 10, 3] and not ours.requires_grad
    torch.testing.assert_close(ours, loss_of(rows, targets).detach())


def test_a_second_backward_pass_is_refused(problem):
    rows, _, head = problem
    loss = sum_in_chunks(lambda part: head(part).square().sum(), rows, size=10)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="has been differentiated before"):
        loss.backward()
