"""L-ADMM and ALPS against their iterations written out, and against what they claim to be better than."""

from functools import partial

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight
from torch import linalg, nn
from torch.utils.data import DataLoader

from benchmarks.baselines import alps
from benchmarks.baselines.alps import ALPSModifier, alps_support, conjugate_gradients, next_penalty
from benchmarks.baselines.l_admm import LADMMModifier, l_admm
from benchmarks.baselines.layer_wise import normalised
from benchmarks.magnitude import pruned_linears

MODIFIERS = [LADMMModifier, ALPSModifier]


def problem(rows=24, columns=32, *, dtype=torch.float32):
    """A weight and the Gram matrix of inputs that are correlated and of different sizes."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    inputs = normal(500, columns) @ (normal(columns, columns) / columns**0.5 + 0.5 * torch.eye(columns))
    inputs *= normal(columns).exp()
    return normal(rows, columns).to(dtype), (inputs.T @ inputs).to(dtype)


def error(found, weight, gram):
    difference = (found - weight).double()
    return float((difference @ gram.double() * difference).sum())


def largest(scores, keep):
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().argsort(descending=True)[:keep]] = True
    return mask.view_as(scores)


def least_squares(weight, gram, mask):
    """The best weights on a support, row by row."""
    result = torch.zeros_like(weight)
    for row, kept in enumerate(mask):
        result[row, kept] = linalg.solve(gram[kept][:, kept], (gram @ weight[row])[kept])
    return result


def test_normalising_changes_the_problem_by_the_damping_alone():
    weight, gram = problem(dtype=torch.float64)
    found = torch.randn_like(weight)
    scaled, of_unit_norm, norms = normalised(weight, gram, damping=0.0)
    torch.testing.assert_close(of_unit_norm.diagonal(), torch.ones(32, dtype=torch.float64))
    assert error(found * norms, scaled, of_unit_norm) == pytest.approx(error(found, weight, gram))
    damped = normalised(weight, gram, damping=0.1)[1]
    torch.testing.assert_close(damped - of_unit_norm, 0.1 * torch.eye(32, dtype=torch.float64))


def test_l_admm_is_its_iterations_written_out():
    weight, gram = problem(dtype=torch.float64)
    keep, rho = 150, 0.7
    norms = gram.diagonal().sqrt()
    x0 = weight * norms
    hessian = torch.diag(1 / norms) @ gram @ torch.diag(1 / norms) + 0.1 * torch.eye(32)
    x, u = x0, torch.zeros_like(x0)
    for t in range(1, 8):
        if t <= 4:
            mask = largest((x + u).abs(), 768 - round(618 * (1 - (1 - t / 4) ** 3)))
        z = (x + u) * mask
        u = u + x - z
        x = linalg.solve(hessian + rho * torch.eye(32), (x0 @ hessian + rho * (z - u)).T).T
    expected = (x + u) * mask / norms
    found = l_admm(weight, gram, keep, iterations=7, selecting=4, damping=0.1, rho=rho)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("iterations", [4, 300])
def test_alps_support_is_its_iterations_written_out(iterations):
    weight, gram = problem(dtype=torch.float64)
    keep, rho = 150, 0.1
    scaled, gram, _ = normalised(weight, gram, damping=0.01)
    mask = before = largest(scaled.abs(), keep)
    d, v, stopped = scaled * mask, torch.zeros_like(scaled), None
    for t in range(1, iterations + 1):
        b = linalg.solve(gram + rho * torch.eye(32), (scaled @ gram - v + rho * d).T).T
        mask = largest((b + v / rho).abs(), keep)
        d = (b + v / rho) * mask
        v = v + rho * (b - d)
        if t % 3 == 0:
            changed = int((mask != before).sum())
            if changed == 0:
                stopped = t
                break
            rho *= 1.3 if changed >= 15 else 1.2 if changed >= 0.75 else 1.1
            before = mask
    assert (stopped is None) == (iterations == 4)
    found, support = alps_support(scaled, gram, keep, rho=0.1, iterations=iterations)
    assert torch.equal(support, mask)
    torch.testing.assert_close(found, d, rtol=1e-5, atol=1e-4)


def test_the_penalty_rises_faster_the_more_of_the_support_changes():
    rises = [next_penalty(2.0, changed, 1000) / 2 for changed in (1, 4, 5, 99, 100, 2000)]
    assert rises == pytest.approx([1.1, 1.1, 1.2, 1.2, 1.3, 1.3])


def test_conjugate_gradients_reach_the_least_squares_solution_on_the_support():
    weight, gram = problem(dtype=torch.float64)
    mask = largest(torch.rand_like(weight), 150)
    mask[3] = False  # a row that keeps nothing
    start = weight * mask
    expected = least_squares(weight, gram, mask)
    found = conjugate_gradients(start, weight @ gram, gram, mask, iterations=40)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    refined = [conjugate_gradients(start, weight @ gram, gram, mask, iterations=i) for i in range(5)]
    errors = [error(each, weight, gram) for each in refined]
    assert errors == sorted(errors, reverse=True)
    # Preconditioned by the diagonal, the steps do not depend on the units of the inputs.
    scaled, unit, norms = normalised(weight, gram, damping=0.0)
    same = conjugate_gradients(start * norms, scaled @ unit, unit, mask, iterations=3) / norms
    torch.testing.assert_close(refined[3], same)


@pytest.mark.parametrize("iterations", [1, 300])
def test_alps_ends_near_the_best_weights_of_its_support(iterations):
    weight, gram = problem()
    found = ALPSModifier(sparsity=0.8, iterations=iterations).pruned(weight, gram, 150)
    best = least_squares(weight.double(), gram.double(), found != 0)
    assert error(best, weight, gram) <= error(found, weight, gram) < 1.01 * error(best, weight, gram)


@pytest.mark.parametrize("modifier", MODIFIERS)
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9])
def test_the_error_is_less_than_that_of_simpler_methods_with_as_many_entries(modifier, sparsity):
    weight, gram = problem(64, 96)
    keep = weight.numel() - round(sparsity * weight.numel())
    found = modifier(sparsity=sparsity).pruned(weight, gram, keep)
    assert int((found != 0).sum()) == keep
    linear = nn.Linear(96, 64, bias=False).requires_grad_(False)
    linear.weight.copy_(weight)
    _, sparse_gpt = sparsify_weight(linear, {linear: gram.clone()}, sparsity, 0, 0, 128, 0.01, False)
    wanda = largest(weight.abs() * gram.diagonal().sqrt(), keep)
    others = {
        "magnitude": weight * largest(weight.abs(), keep),
        "wanda": weight * wanda,
        "wanda's mask, best weights": least_squares(weight.double(), gram.double(), wanda),
        "sparse_gpt": sparse_gpt,
    }
    for name, other in others.items():
        assert error(found, weight, gram) < 0.95 * error(other, weight, gram), name


@pytest.mark.parametrize("modifier", MODIFIERS)
def test_columns_without_inputs_are_pruned_first(modifier):
    weight, gram = problem()
    gram[:, 5] = gram[5] = 0
    found = modifier(sparsity=0.5).pruned(weight, gram, 384)
    assert int((found != 0).sum()) == 384 and found.isfinite().all() and not found[:, 5].any()


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("modifier", MODIFIERS)
def test_every_linear_is_pruned_on_what_the_pruned_layers_before_it_give(modifier, name, load, monkeypatch):
    grams = []
    original = modifier.pruned
    monkeypatch.setattr(modifier, "pruned", lambda self, w, h, k: grams.append(h.clone()) or original(self, w, h, k))
    batches = torch.randint(96, (4, 2, 16), generator=torch.Generator().manual_seed(0))
    loader = DataLoader([{"input_ids": ids} for ids in batches], batch_size=None)
    model = oneshot(model=load(name), dataset=loader, recipe=[modifier(sparsity=0.8)])
    linears = pruned_linears(model)
    assert len(linears) == len(grams) == 14
    assert all(int((m.weight != 0).sum()) == m.weight.numel() - round(0.8 * m.weight.numel()) for m in linears)
    for part in ("lm_head", "model.embed_tokens", "model.norm"):
        assert torch.equal(model.get_submodule(part).weight, load(name).get_submodule(part).weight)
    # The first matrix of the second layer: its inputs depend on the first layer alone.
    inputs = []
    model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        model(input_ids=batches.flatten(0, 1))
    flat = inputs[0].flatten(0, 1)
    expected = flat.T @ flat
    torch.testing.assert_close(grams[7] / grams[7].trace(), expected / expected.trace(), rtol=1e-3, atol=1e-5)


def test_the_logged_warning_of_alps_says_that_it_was_cut_short(monkeypatch):
    weight, gram = problem()
    said = []
    monkeypatch.setattr(alps.logger, "warning", said.append)
    for iterations in (300, 4):
        alps_support(*normalised(weight, gram, damping=0.01)[:2], 150, rho=0.1, iterations=iterations)
    assert said == ["the support still changes after 4 iterations"]
