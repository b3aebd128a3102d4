"""A causal language model in two: its body, up to the last hidden states, and its tail, from there to logits.

The tail is the model's own code, whatever it does after the head (a soft cap, a scale, a bias): its forward pass runs
with the body's replaced by one that returns hidden states found before.
"""

import contextlib
import copy
from collections.abc import Mapping
from typing import Any

import torch
from compressed_tensors.utils import patch_attr
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

__all__ = ["Tail", "run_body", "tail_disagrees"]


class Tail:
    """What ``model`` makes of its last hidden states.

    :param body: the module that they come out of
    :param output: an output of the body
    """

    def __init__(self, model: PreTrainedModel, body: nn.Module, output: ModelOutput) -> None:
        self._model = model
        self._body = body
        # Not to keep the hidden states alive.
        self._output = _with_hidden(output, torch.empty(0))

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (tokens, vocabulary) of hidden states (tokens, width)."""
        output = _with_hidden(self._output, hidden[None])
        with patch_attr(self._body, "forward", lambda *_, **__: output):
            # Ids that nothing looks at, but for their shape.
            ids = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        return logits[0]


def run_body(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tail] | None:
    """Last hidden states (batch, length, width) and the tail; None if the body cannot be found.

    It is the outermost of ``model.base_model`` and ``model.get_decoder()`` that the model calls.
    """
    # One token is enough for the tail, which runs now to no purpose.
    return _run(model, inputs, tokens=1)[1]


def tail_disagrees(model: PreTrainedModel, input_ids: Tensor) -> str | None:
    """What tells that the tail, on hidden states of some tokens, gives other logits than the model; None if nothing.

    :param input_ids: (batch, length) token ids; a few will do
    """
    device = input_ids.device.type
    # A cast that autocast keeps from here, as older torch does, would lead no gradient to its weight later.
    autocast = torch.autocast(
        device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
    )
    with torch.no_grad(), autocast:
        logits, found = _run(model, {"input_ids": input_ids}, tokens=None)
        if found is None:
            return "what computes its last hidden states cannot be found"
        hidden, tail = found
        try:
            parts = torch.cat([tail(part) for part in hidden.flatten(0, 1).split(3)])
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            return f"its head does not run on hidden states alone ({error})"
    whole = logits.flatten(0, 1)
    if parts.shape != whole.shape:
        return f"a part's logits have shape {tuple(parts.shape)}, not {tuple(whole.shape)}"
    # Another number of rows may sum a product in another order.
    exact = logits.dtype == torch.float32 and not torch.is_autocast_enabled(device)
    allowed = (1e-4 if exact else 2e-2) * float(whole.abs().max())
    if not torch.allclose(parts, whole, rtol=0.0, atol=allowed, equal_nan=True):
        return f"logits of some tokens are off by {float((parts - whole).abs().max()):.3g} without the others"
    return None


def _run(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], *, tokens: int | None
) -> tuple[Tensor, tuple[Tensor, Tail] | None]:
    """The logits of one sequence's first ``tokens``, or of all, and the hidden states that the body ends in."""
    entered: list[nn.Module] = []
    found: list[tuple[Tensor, Tail]] = []

    def leave(module: nn.Module, _: Any, output: Any) -> ModelOutput | None:
        hidden = getattr(output, "last_hidden_state", None)
        if module is not entered[0] or hidden is None:
            return None
        found.append((hidden, Tail(model, module, output)))
        return None if tokens is None else _with_hidden(output, hidden[:1, :tokens])

    with contextlib.ExitStack() as stack:
        for module in {model.base_model, model.get_decoder()} - {model}:
            stack.callback(module.register_forward_pre_hook(lambda module, _: entered.append(module)).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits, found[0] if len(found) == 1 else None


def _with_hidden(output: ModelOutput, hidden: Tensor) -> ModelOutput:
    other = copy.copy(output)
    other.last_hidden_state = hidden
    return other
