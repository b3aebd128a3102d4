"""MaskedGPTQModifier: GPTQ for pruned models, and the same rule for a stock GPTQModifier that follows ELSAModifier."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs, QuantizationStrategy, QuantizationType
from compressed_tensors.utils import match_named_modules
from llmcompressor.core import State, active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from loguru import logger
from pydantic import Field
from torch import Tensor

from elsa_modifier.composition import check_recipe
from elsa_modifier.quantization.descent import coordinate_descent
from elsa_modifier.quantization.grid import Grid
from elsa_modifier.quantization.llmcompressor_gptq import QuantizeWeight, entry_grid, quantizing_weights_with
from elsa_modifier.quantization.masked_gptq import damped, masked_gptq
from elsa_modifier.quantization.scales import least_squares_scales, search_scales

__all__ = ["DEFAULT_REFINEMENTS", "MaskedGPTQModifier", "keep_zeros", "mask_aware", "release"]

DEFAULT_REFINEMENTS = 4
# A weight with fewer zeros than this was not pruned, and is stock GPTQ's.
_PRUNED = 0.05
# Up to this fraction of kept weights every row has a factor of its own; above, it gains nothing over GPTQ's usual one
# that the descent after it does not (docs/results/masked_gptq_rules.md), and is much slower.
_OWN_FACTORS = 0.4
_FITTED_STRATEGIES = (QuantizationStrategy.CHANNEL, QuantizationStrategy.GROUP)
# Groups below this have no kernels, and their scales take a large part of what quantization saves.
_SMALLEST_GROUP = 16


class MaskedGPTQModifier(GPTQModifier):
    """
    GPTQ that keeps the zeros of a pruned model, and compensates errors with the kept weights alone.

    The mask is where the weights are zero, so the model may have been pruned in this recipe, in another process, or by
    another method. Weights without zeros are quantized as GPTQModifier does it. A GPTQModifier that follows
    ELSAModifier in a recipe does the same; this one is for checkpoints that are pruned already, and for its fields.

    Sample yaml:

    ```yaml
    quantize_stage:
      quantize_modifiers:
        MaskedGPTQModifier:
          scheme: W4A16
          ignore: [lm_head]
    ```

    Lifecycle: as GPTQModifier's.

    :param refinements: passes of coordinate descent over each quantized weight, after GPTQ's own pass
    :param fit_scales: fit the scales of integer schemes to the kept weights: a search before GPTQ, and least squares
        for the integers found between two refinements. Otherwise they are the observer's

    Its other parameters are those of GPTQModifier. Groups of a preset ``scheme`` that do not divide the model's widths
    are made smaller until they do; those of ``config_groups`` are taken as they are.
    """

    refinements: int = Field(DEFAULT_REFINEMENTS, ge=0)
    fit_scales: bool = True

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """As GPTQModifier does, after fitting the groups of preset schemes to the model's widths.

        :raises ValueError: if the recipe cannot work; see :func:`~elsa_modifier.composition.check_recipe`
        """
        self.fit_groups(state.model)
        check_recipe(active_session().lifecycle.recipe.modifiers, state.model)
        return bool(super().on_initialize(state, **kwargs))

    def fit_groups(self, model: torch.nn.Module) -> None:
        """Halve a preset scheme's group sizes until they divide every width they apply to: 64 for 576, not 128."""
        if self.scheme is None:
            return
        for scheme in self.resolved_config.config_groups.values():
            if scheme.weights is None or scheme.weights.strategy != QuantizationStrategy.GROUP:
                continue
            matched = match_named_modules(model, set(scheme.targets), self.ignore)
            widths = {module.weight.shape[-1] for _, module in matched if hasattr(module, "weight")}
            size = stated = scheme.weights.group_size
            while size > _SMALLEST_GROUP and any(width % size for width in widths):
                size //= 2
            if size != stated and not any(width % size for width in widths):
                logger.info(
                    f"group_size {stated} of {self.scheme} does not divide all of {sorted(widths)}: using {size}."
                )
                scheme.weights.group_size = size

    def compress_module_list(self, module_list: list[torch.nn.Module]) -> None:
        """Quantize modules whose Hessians have been collected."""
        rule = partial(mask_aware, refinements=self.refinements, fit_scales=self.fit_scales)
        with quantizing_weights_with(rule):
            super().compress_module_list(module_list)


def keep_zeros(modifiers: Iterable[Modifier]) -> None:
    """Have stock GPTQModifiers quantize as MaskedGPTQModifier does, until :func:`release`.

    A method of theirs is replaced, and llm-compressor's function for the length of its calls alone: whatever fails, the
    GPTQModifier of another run is its own. These take part in none: llm-compressor initializes a modifier only once.

    :param modifiers: initialized ones; others than stock GPTQModifiers are left alone
    """
    for modifier in modifiers:
        if isinstance(modifier, GPTQModifier) and not isinstance(modifier, MaskedGPTQModifier):
            # Past pydantic, which knows no attributes but fields.
            stock = partial(type(modifier).compress_module_list, modifier)
            modifier.__dict__["compress_module_list"] = partial(_compress, stock)


def release(modifiers: Iterable[Modifier]) -> None:
    """Undo :func:`keep_zeros`, wherever it was done."""
    for modifier in modifiers:
        modifier.__dict__.pop("compress_module_list", None)


def _compress(stock: Callable[[list[torch.nn.Module]], None], modules: list[torch.nn.Module]) -> None:
    with quantizing_weights_with(mask_aware):
        stock(modules)


def mask_aware(
    original: QuantizeWeight, *, refinements: int = DEFAULT_REFINEMENTS, fit_scales: bool = True
) -> QuantizeWeight:
    """llm-compressor's ``quantize_weight``, but that pruned weights stay pruned. Writes fitted scales to ``scale``.

    :param original: what weights without zeros are given to
    """

    def quantize_weight(
        weights: Tensor,
        hessians: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        global_scale: Tensor | None,
        quant_args: QuantizationArgs,
        blocksize: int = 128,
        percdamp: float = 0.01,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kept = weights != 0
        is_pruned = (kept.float().mean(dim=(1, 2)) <= 1 - _PRUNED).tolist()
        if not any(is_pruned):
            of_all = (weights, hessians, scale, zero_point, global_scale)
            return original(*of_all, quant_args=quant_args, blocksize=blocksize, percdamp=percdamp)
        results = []
        for i in range(weights.shape[0]):
            of_one = (
                weights[i],
                hessians[i],
                scale[i],
                zero_point[i],
                None if global_scale is None else global_scale[i],
            )
            stock = partial(_quantize_as_stock, original, quant_args, blocksize, percdamp)
            if is_pruned[i]:
                results.append(_quantize_pruned(*of_one, quant_args, percdamp, stock, refinements, fit_scales))
            else:
                results.append(stock(*of_one))
        quantized, losses, fell_back = (torch.stack(values) for values in zip(*results, strict=True))
        return quantized, losses, fell_back

    return quantize_weight


def _quantize_as_stock(
    original: QuantizeWeight, args: QuantizationArgs, blocksize: int, damping: float, *of_one: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    # It works in place.
    batch = [None if t is None else t.unsqueeze(0).clone() for t in of_one]
    quantized, loss, fell_back = original(*batch, quant_args=args, blocksize=blocksize, percdamp=damping)
    return quantized[0], loss[0], fell_back[0]


def _quantize_pruned(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    global_scale: Tensor | None,
    args: QuantizationArgs,
    damping: float,
    stock: QuantizeWeight,
    refinements: int,
    fit_scales: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    values, mask = weight.float(), weight != 0
    observed, zero_point = scale.to(weight.device), zero_point.to(weight.device)
    curvature = damped(hessian.float(), damping)
    fits = fit_scales and args.type == QuantizationType.INT and args.strategy in _FITTED_STRATEGIES

    def grid_of(scale: Tensor) -> Grid:
        return entry_grid(args, scale, zero_point, global_scale, (weight.shape[0], weight.shape[1]))

    fitted = search_scales(values, mask, curvature.diagonal(), observed, grid_of) if fits else observed
    grid = grid_of(fitted)
    fell_back = torch.tensor(False, device=weight.device)
    try:
        if float(mask.float().mean()) <= _OWN_FACTORS:
            quantized = masked_gptq(values, curvature, mask, grid, order=_order(curvature, args))
        else:
            quantized, _, fell_back = stock(weight, hessian, fitted, zero_point, global_scale)
            quantized = quantized.float() * mask
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        logger.warning("A Hessian is not positive definite: rounding instead. More calibration samples would help.")
        quantized, fell_back = grid.round(values) * mask, torch.tensor(True, device=weight.device)
    for i in range(refinements):
        if fits and i:
            fitted = least_squares_scales(values, quantized, curvature, fitted)
            integers = quantized / grid.scales
            grid = grid_of(fitted)
            quantized = grid.round(integers * grid.scales) * mask
        quantized = coordinate_descent(values, quantized, curvature, mask, grid)
    scale.copy_(fitted)
    errors = values - quantized
    return quantized.to(weight.dtype), 0.5 * ((errors @ curvature) * errors).sum(), fell_back


def _order(curvature: Tensor, args: QuantizationArgs) -> Tensor:
    """The order of columns that ``actorder`` asks for."""
    if args.actorder in (ActivationOrdering.STATIC, ActivationOrdering.WEIGHT):
        return curvature.diagonal().argsort(descending=True)
    return torch.arange(curvature.shape[0], device=curvature.device)
