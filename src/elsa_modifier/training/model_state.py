"""Making a model trainable for a while, and giving it back as it was but for its weights' values.

Weights in bf16 are matrices; vectors (norms, biases) are few and stay fp32. So does the residual stream, the sum of
what the layers add to the embeddings, as under autocast it is for fp32 weights: bf16 would round it in every layer.
"""

import contextlib
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from itertools import repeat

import torch
from compressed_tensors.offload import remove_dispatch
from compressed_tensors.offload.cache import OffloadCache
from compressed_tensors.utils import patch_attr, patch_attrs
from llmcompressor.modeling.moe import context as moe_context
from llmcompressor.modifiers.utils.hooks import HooksMixin
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

__all__ = ["WEIGHT_DTYPES", "embed_in_fp32", "trainable", "trained_dtype", "training_mode", "undispatched"]

WEIGHT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def trained_dtype(parameter: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a floating-point parameter is held in when the weights are to be of ``dtype``."""
    return dtype if parameter.ndim > 1 else torch.float32


def embed_in_fp32(model: PreTrainedModel) -> RemovableHandle:
    """Have the residual stream begin, and under autocast remain, in fp32 until the handle is removed."""
    embeddings: nn.Module = model.get_input_embeddings()
    return embeddings.register_forward_hook(lambda module, inputs, output: output.float())


@contextlib.contextmanager
def trainable(
    model: PreTrainedModel,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    activation_checkpointing: bool = False,
    frozen: AbstractSet[str] = frozenset(),
) -> Iterator[None]:
    """Within the context floating-point parameters are contiguous, on ``device``, and require gradients.

    llm-compressor's offloading is taken off, other modifiers' hooks do not fire, nothing is quantized, experts see only
    the tokens routed to them, and modules are in training mode. Afterwards, whether or not the body failed, all of this
    is as before; the parameters are back in their dtype and place, with new values and without gradients.

    :param dtype: of the weights, see above; for bf16, run the model under autocast
    :param activation_checkpointing: keep the inputs of each layer alone, and run it again in the backward pass
    :param frozen: names of parameters that require none, and whose values are the same afterwards, bit for bit
    :raises ValueError: if a parameter has no data (a model offloaded to disk, or on the meta device), or the model's
        class does not know activation checkpointing
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(undispatched(model, device))
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                raise ValueError(f"parameter {name} has no data to train; load the model into memory, not onto disk")
        stack.callback(_restore_modes, {module: module.training for module in model.modules()})
        stack.enter_context(_training_tensors(model, device, dtype, frozen))
        stack.enter_context(training_mode(model, activation_checkpointing=activation_checkpointing))
        yield


@contextlib.contextmanager
def training_mode(model: PreTrainedModel, *, activation_checkpointing: bool = False) -> Iterator[None]:
    """Of :func:`trainable`, what is not about tensors; modules remain in training mode."""
    with contextlib.ExitStack() as stack:
        stack.callback(embed_in_fp32(model).remove)
        if activation_checkpointing:
            stack.enter_context(_activation_checkpointing(model))
        stack.enter_context(HooksMixin.disable_hooks())
        # A quantizer that comes later has attached schemes, to whose scales nothing has been written. llm-compressor
        # disables them, but enables all again at the end of every pipeline that calibrates.
        stack.enter_context(patch_attrs(model.modules(), "quantization_enabled", repeat(False)))
        stack.enter_context(patch_attr(moe_context, "_CALIBRATE_ALL_EXPERTS", False))
        stack.enter_context(torch.enable_grad())
        model.train()
        yield


@contextlib.contextmanager
def undispatched(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Within the context llm-compressor's offloading is taken off; afterwards it loads weights onto ``device``.

    It is put back as it was, not made anew: among several ranks that would share main memory between them.
    """
    offloaded = [module for module in model.modules() if isinstance(module._parameters, OffloadCache)]
    before = [(m, m._parameters, m._buffers, m.forward, m._original_forward_func) for m in offloaded]
    if offloaded:
        remove_dispatch(model)
        # Offloading gives each module a parameter of its own, tied or not.
        model.tie_weights()
    try:
        yield
    finally:
        for module, parameters, buffers, forward, original in before:
            parameters.onload_device = buffers.onload_device = device
            module._parameters, module._buffers = parameters, buffers
            module.forward, module._original_forward_func = forward, original


def _restore_modes(modes: dict[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training


@contextlib.contextmanager
def _activation_checkpointing(model: PreTrainedModel) -> Iterator[None]:
    if not model.supports_gradient_checkpointing:
        raise ValueError(f"activation_checkpointing is true, but {type(model).__name__} does not support it")
    before = model.is_gradient_checkpointing
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        if not before:
            model.gradient_checkpointing_disable()


@contextlib.contextmanager
def _training_tensors(
    model: nn.Module, device: torch.device, dtype: torch.dtype, frozen: AbstractSet[str]
) -> Iterator[None]:
    parameters = [(p, p.device, p.dtype, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    # Not to be found again in what they are cast to for the run.
    kept = {p: p.data for name, p in model.named_parameters(remove_duplicate=False) if name in frozen}
    buffers = [(b, b.device) for b in model.buffers()]
    try:
        for parameter, *_ in parameters:
            parameter.data = parameter.data.to(device, trained_dtype(parameter, dtype)).contiguous()
            parameter.requires_grad_(parameter not in kept)
        for buffer, _ in buffers:
            buffer.data = buffer.data.to(device)
        yield
    finally:
        for parameter, place, dtype, requires_grad in parameters:
            parameter.grad = None
            parameter.data = kept.get(parameter, parameter.data).to(place, dtype)
            parameter.requires_grad_(requires_grad)
        for buffer, place in buffers:
            buffer.data = buffer.data.to(place)
