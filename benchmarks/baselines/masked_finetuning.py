"""Finetuning of what another method has pruned: its zeros stay, the rest is trained."""

from pydantic import PrivateAttr
from torch import Tensor

from benchmarks.baselines.training import TrainingBaseline

__all__ = ["MaskedFinetuningModifier"]


class MaskedFinetuningModifier(TrainingBaseline):
    """
    Train the weights that are not 0, and all that is not pruned.

    After another modifier in one recipe, or on a model that is sparse already. A pruned weight has no gradient, so that
    neither clipping nor Adam's moments see it.
    """

    _masks: list[Tensor] = PrivateAttr(default_factory=list)

    def before_training(self, weights: list[Tensor]) -> None:
        """The mask is what is not 0.

        :raises ValueError: if that is everything
        """
        self._masks = [weight != 0 for weight in weights]
        if all(bool(mask.all()) for mask in self._masks):
            raise ValueError(
                "no weight of the model is 0, so there is no mask to keep: put a modifier that prunes before "
                "MaskedFinetuningModifier, or load a pruned model"
            )

    def before_clipping(self, weights: list[Tensor]) -> None:
        """Pruned weights get no gradient."""
        for weight, mask in zip(weights, self._masks, strict=True):
            if weight.grad is not None:
                weight.grad.mul_(mask)
