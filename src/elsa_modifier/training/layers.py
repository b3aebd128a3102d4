"""The decoder layers of a model, and what they put out."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

__all__ = ["decoder_layers", "layer_outputs"]


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The model's decoder layers in order; empty if it has no list of as many as its configuration says."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return list(max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=[]))


@contextlib.contextmanager
def layer_outputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """A list that the hidden states (batch, length, width) after each layer are appended to within the context."""
    found: list[Tensor] = []

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])

    with contextlib.ExitStack() as stack:
        for layer in decoder_layers(model):
            stack.callback(layer.register_forward_hook(leave).remove)
        yield found
