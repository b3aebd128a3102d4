"""LLaMA-shaped models of random weights, pruned: for memory and speed at shapes of which no real model is at hand."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.assets import model_directory

__all__ = ["random_llama"]


@torch.no_grad()
def random_llama(
    directory: Path, sparsity: float, *, vocabulary: int | None = None, seed: int = 0, **shape: int
) -> Path:
    """Write an ordinary bf16 checkpoint directory: SmolLM2's tokenizer, random weights, each kept with one probability.

    :param directory: where to; nothing may be there
    :param sparsity: fraction of zeros of every linear layer but ``lm_head``
    :param vocabulary: rows of the embeddings; None for the tokenizer's, fewer serve token ids only
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
    for name, module in model.named_modules():
        weight: Tensor | None = getattr(module, "weight", None)
        if weight is None:
            continue
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight.normal_(0, (weight.shape[1] * (1 - sparsity)) ** -0.5, generator=generator)
            weight.mul_(torch.rand(weight.shape, generator=generator) >= sparsity)
        elif isinstance(module, nn.Linear | nn.Embedding):
            weight.normal_(generator=generator)
        else:
            weight.fill_(1)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
