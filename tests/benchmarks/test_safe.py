"""SAFE and SAFE+ against their algorithm written out, and what they are said to do with a model."""

import math

import pytest
import torch
from llmcompressor import oneshot
from torch import nn

from benchmarks.baselines.safe import SAFEModifier, SplitWeight, sharpness_aware_gradients_
from benchmarks.magnitude import prune_by_magnitude_, pruned_linears
from elsa_modifier.training.precision import multiplies_bf16

RUN = dict(sparsity=0.6, steps=4, batch_size=2, sequence_length=16, lr=0.01, epochs=6, warmup_epochs=1, interval=4)


def largest(scores, keep):
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().argsort(descending=True)[:keep]] = True
    return mask.view_as(scores)


def test_gradients_are_those_at_the_edge_of_the_ball():
    a, b, idle = (nn.Parameter(torch.tensor(values)) for values in ([1.0, -2.0], [3.0], [5.0]))
    kept = a.detach().clone(), b.detach().clone()
    sharpness_aware_gradients_([a, b, idle], lambda: (a**4).sum() / 4 + (b**4).sum() / 4, radius=0.5)
    norm = math.sqrt(1 + 8**2 + 27**2)
    expected = [(x + 0.5 * x**3 / norm) ** 3 for x in (1, -2, 3)]
    assert [*a.grad.tolist(), *b.grad.tolist()] == pytest.approx(expected)
    assert torch.equal(a, kept[0]) and torch.equal(b, kept[1]) and idle.grad is None


def test_a_split_weight():
    weight = nn.Parameter(torch.tensor([[3.0, -1.0, 2.0]]))
    split = SplitWeight(weight, 1, None)
    assert split.z.tolist() == [[3, 0, 0]] and not split.u.any()
    weight.data = torch.tensor([[1.0, -1.5, 0.5]])
    split.update_()
    assert split.z.tolist() == [[0, -1.5, 0]] and split.u.tolist() == [[1, 0, 0.5]]
    split.update_()
    assert split.z.tolist() == [[2, 0, 0]] and split.u.tolist() == [[0, -1.5, 1]]
    weight.grad = torch.ones(1, 3)
    split.add_penalty_gradient_(0.1)
    assert weight.grad.flatten().tolist() == pytest.approx([1 + 0.1 * (1 - 2 + 0), 1 + 0.1 * (-3), 1 + 0.1 * 1.5])
    split.finish_()
    assert weight.tolist() == [[0, -1.5, 0]]
    assert SplitWeight(weight, 1, torch.tensor([1.0, 0.0, 0.0])).projected(torch.ones(1, 3)).tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("activation", [False, True])
def test_a_layer_is_trained_as_the_algorithm_says(activation):
    """One matrix, whose gradients are known."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(6, 5, bias=False)
    start = torch.randn(5, 6, generator=generator)
    layer.weight.data = start.clone()
    inputs = [torch.randn(2, 3, 6, generator=generator) * torch.tensor([9.0, 1, 1, 0.1, 1, 3]) for _ in range(4)]
    lam, radius, keep = 0.3, 0.05, 12
    modifier = SAFEModifier(**RUN | {"penalty": lam, "radius": radius, "activation": activation})
    torch.manual_seed(1)
    outputs = modifier._prune_layer(layer, layer, inputs)

    torch.manual_seed(1)
    order = [int(i) for _ in range(6) for i in torch.randperm(4)]
    flat = [batch.flatten(0, 1).double() for batch in inputs]
    targets = [batch @ start.double().T for batch in flat]
    scale = torch.cat(flat).square().sum(0).sqrt() if activation else torch.ones(6)
    x, first, second = start.double(), 0.0, 0.0
    z, u = x * largest(x.abs() * scale, keep), torch.zeros_like(x)
    for t, i in enumerate(order, start=1):

        def gradient(w, i=i):
            return 2 / targets[i].numel() * (flat[i] @ w.T - targets[i]).T @ flat[i]

        there = gradient(x)
        # The weights of the first step are those that gave the targets.
        g = gradient(x + radius * there / max(float(there.norm()), 1e-12)) + lam * (x - z + u)
        first, second = 0.9 * first + 0.1 * g, 0.95 * second + 0.05 * g**2
        lr = 0.01 * ((t - 1) / 4 if t <= 4 else (24 - (t - 1)) / 20)
        x = x - lr * (first / (1 - 0.9**t)) / ((second / (1 - 0.95**t)).sqrt() + 1e-8)
        if t % 4 == 0:
            z = (x + u) * largest((x + u).abs() * scale, keep)
            u = u + x - z
    x = x * largest(x.abs() * scale, keep)
    torch.testing.assert_close(layer.weight.double(), x, rtol=1e-3, atol=1e-4)
    for found, batch in zip(outputs, inputs, strict=True):
        assert torch.equal(found, layer(batch))


@pytest.mark.parametrize("activation", [False, True])
def test_layer_after_layer_is_pruned_and_nothing_else_changes(activation, load, texts, monkeypatch):
    seen = []
    original = SAFEModifier._prune_layer

    def watched(self, layer, run, inputs):
        with torch.no_grad():
            dense = [run(batch) for batch in inputs]
        outputs = original(self, layer, run, inputs)
        seen.append((inputs, dense, outputs))
        return outputs

    monkeypatch.setattr(SAFEModifier, "_prune_layer", watched)
    model = oneshot(model=load("llama-tied"), dataset=texts, recipe=[SAFEModifier(**RUN | {"activation": activation})])
    for linear in pruned_linears(model):
        assert int((linear.weight == 0).sum()) == round(0.6 * linear.weight.numel())
    before = load("llama-tied")
    for part in ("lm_head", "model.embed_tokens", "model.norm"):
        assert torch.equal(model.get_submodule(part).weight, before.get_submodule(part).weight)
    norm = "model.layers.0.input_layernorm"
    assert not torch.equal(model.get_submodule(norm).weight, before.get_submodule(norm).weight)
    assert not any(p.grad is not None for p in model.parameters())
    (first_inputs, _, first_outputs), (second_inputs, _, last) = seen
    assert second_inputs is first_outputs and len(first_inputs) == 4 and first_inputs[0].shape == (2, 16, 32)

    def error(found, wanted):
        return float(sum((a - b).square().sum() for a, b in zip(found, wanted, strict=True)))

    # Less is lost than by zeroing the smallest weights of the same layer.
    prune_by_magnitude_(before, 0.6)
    rotary = before.model.rotary_emb(first_inputs[0], torch.arange(16)[None])
    with torch.no_grad():
        simple = [before.model.layers[0](batch, position_embeddings=rotary) for batch in first_inputs]
    assert error(first_outputs, seen[0][1]) < 0.7 * error(simple, seen[0][1])
    # What the last layer gives is what the whole model makes of its embeddings.
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16(torch.device("cpu"))):
        caught = []
        model.model.norm.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
        model.model(inputs_embeds=first_inputs[1])
    assert error([caught[0].float()], last[1:2]) < 1e-4 * float(last[1].square().sum())
