"""The simplest baseline: zero the smallest weights of every Linear, once, and do nothing else."""

import torch
from torch import nn
from transformers import PreTrainedModel

from elsa_modifier.admm import parse_mask_structure, sparse_mask

__all__ = ["linear_sparsity", "prune_by_magnitude_", "pruned_linears"]


def pruned_linears(model: PreTrainedModel) -> list[nn.Linear]:
    """Every Linear but ``lm_head``."""
    return [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]


@torch.no_grad()
def prune_by_magnitude_(model: PreTrainedModel, sparsity: float, mask_structure: str = "unstructured") -> None:
    """Zero exactly the given fraction of every Linear's weight but ``lm_head``'s, in place.

    :param mask_structure: or ``N:M``, which says by itself how many those are
    """
    for module in pruned_linears(model):
        weight = module.weight
        keep = weight.numel() - round(sparsity * weight.numel())
        weight.masked_fill_(~sparse_mask(weight.abs().float(), keep, parse_mask_structure(mask_structure)), 0.0)


def linear_sparsity(model: PreTrainedModel) -> float:
    """Fraction of zeros over all Linears but ``lm_head``."""
    weights = [module.weight for module in pruned_linears(model)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
