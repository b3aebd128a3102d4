"""What forward and backward of one micro-batch hold beyond weights: the model's own code, run on tensors without data.

A deep model of like layers needs no more than two shallow copies of it. Every layer adds the same bytes to the fullest
moment of the forward pass, of the backward pass through head and top layers, and of that through the bottom layers, so
each lies on a line over the depth. In the layers between, memory moves evenly from one to the other.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.utils import patch_attr
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import linearize_moe
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, masking_utils

from elsa_modifier.planning.settings import RunSettings
from elsa_modifier.planning.tracing import LiveStorage, Phase
from elsa_modifier.training.distillation import Distillation
from elsa_modifier.training.layers import decoder_layers
from elsa_modifier.training.model_state import embed_in_fp32, trained_dtype

__all__ = ["MicroBatchPeak", "fake_model", "trace_micro_batch"]


@dataclass(frozen=True)
class MicroBatchPeak:
    """Traces of the same model at one depth, or at two, of which ``depth`` layers are wanted."""

    depth: int
    traces: tuple[tuple[int, LiveStorage], ...]

    def bytes(self, bytes_per_gradient: float) -> int:
        """The fullest moment, weights not counted, at so many bytes for an entry of a gradient that is held."""
        if len(self.traces) == 1:
            return math.ceil(max(self.traces[0][1].peak(phase, bytes_per_gradient) for phase in Phase))
        (depth, trace), (deeper, deeper_trace) = self.traces
        peaks = []
        for phase in (Phase.FORWARD, Phase.TOP, Phase.BOTTOM):
            start = trace.peak(phase, bytes_per_gradient)
            per_layer = (deeper_trace.peak(phase, bytes_per_gradient) - start) / (deeper - depth)
            peaks.append(start + per_layer * (self.depth - depth))
        return math.ceil(max(peaks))


def fake_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of a configuration whose tensors have shapes and no data, with experts as oneshot has them.

    :raises ValueError: if transformers makes no causal language model of the configuration
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
        linearize_moe(model)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(trained_dtype(parameter, dtype))
        embed_in_fp32(model)
        return model.train()


def trace_micro_batch(config: PreTrainedConfig, settings: RunSettings, dtype: torch.dtype) -> MicroBatchPeak:
    """Run forward, loss and backward of the last micro-batch of a step without data.

    :param dtype: of the weights that forward and backward see
    :raises ValueError: if the model's class does not know activation checkpointing
    :raises RuntimeError: if the model's code needs values to know what to do
    """
    model = fake_model(config, dtype)
    period = _period(_signatures(model))
    depth = len(decoder_layers(model))
    # The top and the bottom layers must be two groups, and the top ones those of the whole model.
    depths = [groups * period + depth % max(1, period) for groups in (2, 3)]
    traced = [(depth, model)]
    if 0 < depths[1] < depth:
        shallow = [(count, fake_model(_at_depth(config, count), dtype)) for count in depths]
        if all(_signatures(m) == _signatures(model)[:count] for count, m in shallow):
            traced = shallow
    return MicroBatchPeak(depth, tuple((count, _trace(m, settings, period)) for count, m in traced))


def _trace(model: PreTrainedModel, settings: RunSettings, period: int) -> LiveStorage:
    parameters = list(model.parameters())
    experts = max((m.num_experts for m in model.modules() if isinstance(m, LinearExperts2D)), default=1)
    if settings.activation_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ValueError(f"activation_checkpointing is true, but {type(model).__name__} does not support it")
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # transformers knows tensors without data, and makes masks for them that a run does not need; see LiveStorage.
    with _mode_of(model), patch_attr(masking_utils, "is_tracing", lambda *_: False):
        loss_of = settings.objective.of(model, sparsity=0.5)  # the same tensors at any
        held = loss_of.teacher.parameters() if isinstance(loss_of, Distillation) else ()
        ids = torch.zeros(settings.batch_size, settings.sequence_length, dtype=torch.int64)
        tracker = LiveStorage([*parameters, *model.buffers(), *held, ids], experts=experts)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(
                _drop_gradient if settings.gradient_release else tracker.is_gradient
            )
        _mark_phases(model, tracker, period)
        with tracker:
            if settings.accumulates:
                for parameter in parameters:
                    parameter.grad = torch.zeros_like(parameter)
                    tracker.is_gradient(parameter)
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
                loss = loss_of(model, {"input_ids": ids, "labels": ids}) / ids.numel()
            tracker.phase = Phase.TOP
            loss.backward()
    return tracker


def _mode_of(model: PreTrainedModel) -> FakeTensorMode:
    weight = next(model.parameters())
    assert isinstance(weight, FakeTensor)
    return weight.fake_mode


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _mark_phases(model: PreTrainedModel, tracker: LiveStorage, period: int) -> None:
    """Have the tracker know when backward has left the top ``period`` layers, and when it enters the bottom ones."""
    layers = decoder_layers(model)
    if len(layers) < 2 * period or period == 0:
        return

    def on_backward_to(layer: nn.Module, phase: Phase) -> None:
        def enter(_: Tensor) -> None:
            tracker.phase = phase

        def watch(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            if hidden.requires_grad:
                hidden.register_hook(enter)

        layer.register_forward_hook(watch)

    on_backward_to(layers[-period - 1], Phase.MIDDLE)
    on_backward_to(layers[period - 1], Phase.BOTTOM)


def _signatures(model: PreTrainedModel) -> list[tuple[Any, ...]]:
    """What tells decoder layers apart: parameters' shapes and the configuration's name for the layer."""
    layers = decoder_layers(model)
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or [None] * len(layers)
    return [
        (kind, tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()))
        for kind, layer in zip(kinds, layers, strict=True)
    ]


def _period(signatures: list[tuple[Any, ...]]) -> int:
    """After how many layers they repeat, to the last one; 0 without layers."""
    count = len(signatures)
    return next((p for p in range(1, count + 1) if all(signatures[i] == signatures[i - p] for i in range(p, count))), 0)


def _at_depth(config: PreTrainedConfig, depth: int) -> PreTrainedConfig:
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    text.num_hidden_layers = depth
    return shallow
