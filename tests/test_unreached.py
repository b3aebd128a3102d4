"""Targets that the text never reaches, inside ``oneshot``; and models that it cannot train."""

import pytest
import torch
from llmcompressor import oneshot
from loguru import logger
from transformers import LlamaForTokenClassification, LlamaModel

from elsa_modifier import ELSAModifier
from elsa_modifier.unreached import summarized
from tests.reference.admm import keep_mask

QUICK = dict(
    sparsity=0.5, steps=6, batch_size=2, sequence_length=16, interval=2, lr=1e-2, precision="fp32", shared_budget=False
)
DEAD = [f"model.layers.{layer}.mlp.experts.3.{part}_proj" for layer in (0, 1) for part in ("up", "gate", "down")]


def without_a_token(model, expert=3):
    """No token is routed to this expert."""

    def divert(module, inputs, output):
        logits, weights, chosen = output
        return logits, weights, chosen.clamp(max=expert - 1)

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(divert)
    return model


@pytest.fixture
def tokens(tokenizer, texts):
    return texts.map(lambda row: tokenizer(row["text"]), remove_columns=["text"])


@pytest.fixture
def warnings():
    found = []
    sink = logger.add(lambda message: found.append(str(message)), level="INFO", format="{message}")
    yield found
    logger.remove(sink)


def fused(model, name):
    """What the class holds of an expert's matrix, as a Linear holds it."""
    module, _, rest = name.partition(".experts.")
    experts = model.get_submodule(f"{module}.experts")
    index, part = rest.split(".")
    if part == "down_proj":
        return experts.down_proj[int(index)].detach().clone()
    half = experts.gate_up_proj.shape[1] // 2
    rows = slice(0, half) if part == "gate_proj" else slice(half, None)
    return experts.gate_up_proj[int(index)][rows].detach().clone()


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(optimizer="adamw", penalty=dict(form="coupled", value=1e-2)),
        dict(optimizer="adam8bit_sr", gradient_release=True, max_grad_norm=None, state_dtype="int8"),
        dict(gradient_release=True, max_grad_norm=None, penalty=dict(form="coupled", value=1e-2)),
        dict(shared_budget=dict(cap=0.9), finalize=0.5),
        dict(finalize=0.0),
        dict(sparsity=None, mask_structure="2:4", gradient_accumulation_steps=2),
    ],
    ids=str,
)
def test_an_expert_without_a_token_stays_as_it_was(fields, load, tokens, warnings):
    model = without_a_token(load("qwen3-moe"))
    before = {name: fused(model, name) for name in DEAD}
    modifier = ELSAModifier(**QUICK | fields)
    model = oneshot(model=model, dataset=tokens, recipe=[modifier])
    for name in DEAD:
        assert torch.equal(model.get_submodule(name).weight, before[name]), name
    assert sorted(modifier.unreached) == sorted(DEAD) and not set(DEAD) & modifier.masks.keys()
    # All others are as sparse as asked for, together where they share a budget.
    weights = [model.get_submodule(name).weight for name in modifier.masks]
    zeros = [int((w == 0).sum()) for w in weights]
    assert len(weights) == 26 and sum(zeros) == sum(w.numel() for w in weights) // 2
    if "shared_budget" not in fields:
        assert zeros == [w.numel() // 2 for w in weights]
    assert modifier.history[-1].sparsity == pytest.approx(0.5)
    assert any("6 of 32 targets had no gradient in the whole run" in text for text in warnings)
    assert any("6 targets without a gradient are as they were" in text for text in warnings)


@pytest.mark.parametrize("finalize", [0.0, 0.5])
def test_asked_for_it_is_pruned_by_magnitude(finalize, load, tokens, warnings):
    model = without_a_token(load("qwen3-moe"))
    before = {name: fused(model, name) for name in DEAD}
    modifier = ELSAModifier(**QUICK, prune_unreached=True, finalize=finalize)
    model = oneshot(model=model, dataset=tokens, recipe=[modifier])
    for name, weight in before.items():
        expected = weight * keep_mask(weight.abs(), weight.numel() // 2)
        assert torch.equal(model.get_submodule(name).weight, expected), name
    assert modifier.unreached == [] and set(DEAD) < modifier.masks.keys()
    assert any("They were pruned by magnitude, as prune_unreached asks" in text for text in warnings)


def test_a_run_that_would_prune_nothing_says_so(load, tokens):
    modifier = ELSAModifier(**QUICK, targets=["re:.*experts[.]3[.].*"])
    with pytest.raises(RuntimeError, match=r"6 of 6 targets had no gradient .*Nothing was pruned; name modules"):
        oneshot(model=without_a_token(load("qwen3-moe")), dataset=tokens, recipe=[modifier])


def test_names_in_few_words():
    names = [f"vision.layers.{i}.{part}" for i in range(3) for part in ("q", "k")] + [
        "projector.1.up",
        "a.h2.w",
        "a.h3.w",
    ]
    assert summarized(names) == "vision.layers.*.q (3), vision.layers.*.k (3), projector.1.up, a.h2.w, a.h3.w"
    assert summarized([f"part{chr(97 + i)}" for i in range(20)]).endswith("parth, 12 more such")


@pytest.mark.parametrize(
    ("model_class", "message"),
    [
        (LlamaModel, "LlamaModel has no causal next-token loss: it gives no logits for token ids"),
        (LlamaForTokenClassification, r"logits have shape \(1, 4, 2\), not \(1, 4, 96\)"),
    ],
)
def test_models_without_next_token_logits_are_refused(model_class, message, checkpoint, tokens, tokenizer):
    model = model_class.from_pretrained(checkpoint())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modifier = ELSAModifier(**QUICK)
    with pytest.raises(ValueError, match=message):
        oneshot(model=model, processor=tokenizer, dataset=tokens, recipe=[modifier])
    assert modifier.history == [] and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("fields", [dict(), dict(weight_dtype="bf16", optimizer="adam8bit_sr")], ids=str)
def test_a_decoder_that_looks_ahead_is_refused(fields, load, tokens):
    model = load("opt")
    model.model.decoder.layers[1].register_forward_hook(lambda module, inputs, output: output + output.mean(1, True))
    modifier = ELSAModifier(**QUICK | dict(precision="bf16") | fields)
    with pytest.raises(ValueError, match="its logits depend on later tokens"):
        oneshot(model=model, dataset=tokens, recipe=[modifier])
    assert modifier.history == []
