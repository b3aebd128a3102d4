"""What layer-wise baselines share: inputs' Gram matrices, collected by llm-compressor's SparseGPT.

One decoder layer after the other, on activations of the layers that are pruned already. A method only says which weight
of a given number of entries makes up best for the dense one on those inputs.
"""

from abc import abstractmethod

import torch
from compressed_tensors.utils import align_module_device, update_offload_parameter
from llmcompressor.modifiers.pruning import SparseGPTModifier
from torch import Tensor

__all__ = ["LayerWiseModifier", "normalised"]


def normalised(weight: Tensor, gram: Tensor, *, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same problem with inputs of norm 1: ``(W - W0) H (W - W0)^T`` is what it was, up to the damping.

    :param weight: (out, in), fp32
    :param gram: (in, in), fp32: sum of ``x x^T`` over inputs, times any number
    :param damping: added to the new Gram matrix's diagonal, which is 1 where there are inputs
    :returns: weight (out, in) times norms, damped Gram matrix of the normalised inputs (in, in), norms (in,)
    """
    norms = gram.diagonal().sqrt()
    # A column that never saw an input: its weight counts as nothing, and is pruned before others.
    norms = norms.clamp_min(1e-6 * norms.amax().clamp_min(torch.finfo(norms.dtype).tiny))
    gram = gram / norms / norms[:, None]
    gram.diagonal().add_(damping)
    return weight * norms, gram, norms


class LayerWiseModifier(SparseGPTModifier):
    """
    Prune every Linear but ``lm_head`` for itself, so that its outputs change little.

    :param sparsity: fraction of zeros in every weight
    """

    # A name alone would not do: SparsityModifierBase looks for "lm_head." when "Linear" is a target. Embeddings tied to
    # the head would be pruned with it.
    ignore: list[str] = ["re:.*lm_head"]  # noqa: RUF012

    @abstractmethod
    def pruned(self, weight: Tensor, gram: Tensor, keep: int) -> Tensor:
        """
        What replaces a weight.

        :param weight: (out, in), fp32
        :param gram: (in, in), fp32: sum of ``x x^T`` over inputs, times any number
        :param keep: how many entries may differ from 0
        """

    @torch.no_grad()
    def compress_modules(self) -> None:
        """Prune the modules whose inputs have been collected."""
        for module in list(self._num_samples):
            del self._num_samples[module]
            gram = self._hessians.pop(module)
            with align_module_device(module):
                weight = module.weight
                keep = weight.numel() - round(self._module_sparsities[module] * weight.numel())
                replacement = self.pruned(weight.float(), gram, keep).to(weight.dtype)
            update_offload_parameter(module, "weight", replacement)
