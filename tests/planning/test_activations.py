"""Traces without data, against real tensors, against arithmetic, and shallow ones against whole ones."""

import dataclasses
import functools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from elsa_modifier.fields import TrainingObjective
from elsa_modifier.planning.activations import (
    MicroBatchPeak,
    _period,
    _signatures,
    _trace,
    fake_model,
    trace_micro_batch,
)
from elsa_modifier.planning.settings import RunSettings
from elsa_modifier.planning.tracing import LiveStorage, Phase
from elsa_modifier.training import objective
from tests.conftest import CONFIGS

SETTINGS = RunSettings(
    steps=1,
    batch_size=2,
    gradient_accumulation_steps=1,
    sequence_length=48,
    precision="bf16",
    weight_dtype="fp32",
    state_dtype="fp32",
    optimizer="adam",
    form="decoupled",
    dual=False,
    objective=TrainingObjective(name="next_token"),
    gradient_release=False,
    offload_state=False,
    activation_checkpointing=False,
)
DEEP = {
    "gemma2": Gemma2Config(
        hidden_size=32,
        num_hidden_layers=9,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        vocab_size=1000,
        sliding_window=16,
    ),
    "llama": LlamaConfig(
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        vocab_size=100,
    ),
}


def test_a_product_and_its_backward_by_hand():
    with FakeTensorMode():
        weight = nn.Parameter(torch.empty(300, 200))
        x = torch.empty(10, 200)
        tracker = LiveStorage([weight, x])
        weight.register_post_accumulate_grad_hook(tracker.is_gradient)
        with tracker:
            y = x @ weight.t()  # (10, 300)
            z = y.relu()  # saves itself; y stays, having a name
            loss = z.sum()  # (); its gradient is expanded, four bytes
            tracker.phase = Phase.TOP
            loss.backward()
    assert tracker.peak(Phase.FORWARD, 0) == 2 * 4 * 10 * 300 + 4
    # At the weight's gradient y, z, loss and its gradient are alive, and the gradient of y.
    assert tracker.peak(Phase.TOP, 0) == 3 * 4 * 10 * 300 + 2 * 4 + 4 * 300 * 200
    assert tracker.peak(Phase.TOP, 100) == pytest.approx(100 * 300 * 200, rel=0.05)


def _peak_of_a_pass(model, loss_of, ids):
    torch.manual_seed(0)
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        (loss_of(model, {"input_ids": ids, "labels": ids}) / 96).backward()
    model.zero_grad()
    allocated = peak = 0
    for event in sorted(profile.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


@pytest.mark.parametrize("chunk", [None, 20])
@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
@pytest.mark.parametrize("minimized", ["next_token", "distill", "distill_hidden"])
def test_as_much_as_real_tensors_take(name, minimized, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(objective, "CHUNK_BYTES", chunk * 4 * 96)
    minimized = TrainingObjective(name=minimized)
    settings = dataclasses.replace(SETTINGS, precision="fp32", objective=minimized)
    planned = trace_micro_batch(CONFIGS[name], settings, torch.float32).bytes(4)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], experts_implementation="eager").train()
    ids = torch.randint(2, 96, (2, 48))
    loss_of = minimized.of(model, sparsity=0.9)
    loss_of(model, {"input_ids": ids, "labels": ids})  # finds out whether the logits can be had in chunks
    # On a busy machine a profile may lack events; none has too many.
    peak = max(_peak_of_a_pass(model, loss_of, ids) for _ in range(3))
    # What runs without gradients beside a teacher's casts is freed sooner than traced.
    assert planned == pytest.approx(peak, rel=0.05 if minimized.has_teacher else 0.01)


@pytest.mark.parametrize(
    "name,change",
    [
        ("gemma2", {}),
        ("llama", {}),
        ("llama", {"gradient_accumulation_steps": 2}),
        ("llama", {"activation_checkpointing": True}),
        ("llama", {"activation_checkpointing": True, "gradient_release": True}),
    ],
    ids=str,
)
def test_shallow_traces_tell_what_the_whole_model_takes(name, change):
    config, settings = DEEP[name], dataclasses.replace(SETTINGS, **change)
    shallow = trace_micro_batch(config, settings, torch.float32)
    assert [depth for depth, _ in shallow.traces] == {"gemma2": [5, 7], "llama": [2, 3]}[name]
    model = fake_model(config)
    depth = config.num_hidden_layers
    whole = MicroBatchPeak(depth, ((depth, _trace(model, settings, _period(_signatures(model)))),))
    for bytes_per_gradient in (0.0, 2.0, 4.0):
        assert shallow.bytes(bytes_per_gradient) == whole.bytes(bytes_per_gradient)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_architecture_can_be_traced(name, dtype):
    assert trace_micro_batch(CONFIGS[name], SETTINGS, dtype).bytes(4) > 2 * 48 * 96 * 4


def test_logits_in_chunks(monkeypatch):
    wide = Gemma2Config(**DEEP["gemma2"].to_dict() | {"vocab_size": 100_000})
    settings = dataclasses.replace(SETTINGS, sequence_length=256)

    def peak():
        return trace_micro_batch(wide, settings, torch.float32).bytes(4)

    def refuse(*_):
        raise AssertionError("a plan has no logits to compare")

    monkeypatch.setattr(objective, "tail_disagrees", refuse)
    tokens, words, width = 2 * 255, 100_000, 32
    whole = peak()
    assert whole > 12 * tokens * words
    monkeypatch.setattr(objective, "CHUNK_BYTES", 64 * 4 * words)
    # Logits in bf16 and fp32, their cap, its derivative, and the loss's, of a chunk; the head's gradient three times.
    assert peak() < 24 * 64 * words + 10 * width * words + 2**22 < 0.5 * whole


def test_what_each_setting_does():
    config = LlamaConfig(**DEEP["llama"].to_dict() | {"num_hidden_layers": 2})

    @functools.cache
    def peak(**change):
        return trace_micro_batch(config, dataclasses.replace(SETTINGS, **change), torch.float32).bytes(4)

    assert peak(activation_checkpointing=True) < 0.9 * peak()
    assert peak(gradient_release=True, activation_checkpointing=True) < peak(activation_checkpointing=True)
    parameters = sum(p.numel() for p in fake_model(config).parameters())
    assert peak(gradient_accumulation_steps=2) > 4 * parameters + 0.9 * peak(gradient_release=True)
    assert peak(batch_size=4) > 1.6 * peak()


def test_layers_unlike_each_other_are_all_traced():
    config = Gemma2Config(
        **{k: v for k, v in DEEP["gemma2"].to_dict().items() if k != "layer_types"},
        layer_types=["full_attention"] + ["sliding_attention"] * 8,
    )
    assert [depth for depth, _ in trace_micro_batch(config, SETTINGS, torch.float32).traces] == [9]
