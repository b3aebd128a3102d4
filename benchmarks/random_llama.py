"""LLaMA-shaped models of random weights, pruned: for memory and speed at shapes of which no real model is at hand."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.assets import model_directory

__all__ = ["random_llama"]


@torch.no_grad()
def random_llama(
    directory: Path, sparsity: float, *, vocabulary: int | None = None, seed: int = 0, **shape: int
) -> Path:
    """Write an ordinary bf16 checkpoint directory: SmolLM2's tokenizer, and weights of which each is kept by chance.

    Every layer has the weights of the first one, which neither memory nor speed depends on.

    :param directory: where to; nothing may be there
    :param sparsity: fraction of zeros of every linear layer but ``lm_head``
    :param vocabulary: rows of the embeddings; None for the tokenizer's; with fewer, prompts have to be token ids
    :param shape: fields of ``LlamaConfig``: ``hidden_size``, ``intermediate_size``, ``num_hidden_layers``, ...
    """
    tokenizer = AutoTokenizer.from_pretrained(model_directory())
    generator = torch.Generator().manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary or len(tokenizer),
        bos_token_id=0,
        eos_token_id=0,
        max_position_embeddings=2048,
        dtype="bfloat16",
        **shape,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    first, *others = model.model.layers
    for module in (model.model.embed_tokens, model.lm_head, *first.modules(), model.model.norm):
        weight: Tensor | None = getattr(module, "weight", None)
        if weight is None:
            continue
        if weight.dim() == 1:
            weight.fill_(1)
            continue
        weight.normal_(generator=generator)
        if module in first.modules():
            weight.div_((weight.shape[1] * (1 - sparsity)) ** 0.5)
            weight.mul_(torch.rand(weight.shape, generator=generator) >= sparsity)
    for layer in others:
        layer.load_state_dict(first.state_dict())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
