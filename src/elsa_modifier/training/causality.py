"""Refusing models whose next-token loss would not be one: what predicts a token must not have seen it."""

import torch
from transformers import PreTrainedModel

__all__ = ["refuse_encoder_decoder", "refuse_without_causal_loss"]

_TOKENS = 4
# Of the gradient that a causal model's logits have at later tokens, which is exactly 0, to that at their own.
_LEAK = 1e-6


def refuse_encoder_decoder(model: PreTrainedModel) -> None:
    """:raises ValueError: if the model reads one text and writes another"""
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model, which has no causal next-token loss: its decoder "
            "predicts a second text from a first. ELSAModifier prunes decoders alone"
        )


def refuse_without_causal_loss(model: PreTrainedModel, *, autocast: bool) -> None:
    """Run a few tokens, and see which of them the logits depend on.

    :param model: whose parameters have data, on the device that they are to run on
    :param autocast: run it in bf16
    :raises ValueError: if it does not give logits for token ids alone, one set for each token, or logits depend on
        later tokens
    """
    name = type(model).__name__
    embeddings = model.get_input_embeddings()
    embedded: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    device = next(embeddings.parameters()).device
    modes = {module: module.training for module in model.modules()}
    handle = embeddings.register_forward_hook(keep)
    try:
        model.eval()
        ids = torch.arange(_TOKENS, device=device).view(1, -1)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{name} has no causal next-token loss: it gives no logits for token ids: {error}") from error
    finally:
        handle.remove()
        for module, training in modes.items():
            module.training = training
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0)
    if logits.ndim != 3 or logits.shape[:2] != ids.shape or logits.shape[2] < vocabulary:
        raise ValueError(
            f"{name} has no causal next-token loss: for {_TOKENS} tokens its logits have shape "
            f"{tuple(logits.shape)}, not (1, {_TOKENS}, {vocabulary})"
        )
    before = logits[:, : _TOKENS - 1].float().square().sum()
    (gradient,) = torch.autograd.grad(before, embedded[-1:])
    own, later = (part.float().nan_to_num().abs().max() for part in (gradient[:, :-1], gradient[:, -1:]))
    if later > _LEAK * own:
        raise ValueError(
            f"{name} has no causal next-token loss: its logits depend on later tokens, so it would learn to copy the "
            "token that it is to predict. Load a decoder, or one with is_decoder set in its configuration"
        )
