"""Modifiers in one recipe: what would not end as each of them was asked is refused before the first step.

llm-compressor initializes every modifier, then runs one after the other, each over the weights that the ones before it
left, then finalizes every one. What each does to the weights decides what may follow it:

* ELSAModifier trains all of them, and holds its own zeros alone;
* SparsityModifierBase (SparseGPT, Wanda) chooses a mask of its own, and moves weights to make up for it;
* SmoothQuantModifier and AWQModifier scale: zeros stay zeros, a grid does not stay a grid;
* quantizers leave weights, or scales, that fit each other only as long as nothing changes the weights.

docs/composition.md has what becomes of every ordered pair; tests/quantization/composition.py runs them.
"""

import math
from collections.abc import Sequence

from compressed_tensors.offload import disable_onloading
from compressed_tensors.quantization import QuantizationScheme, QuantizationStrategy
from compressed_tensors.utils import match_named_modules, match_targets
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import PRUNABLE_LAYER_TYPES, SparsityModifierBase
from llmcompressor.modifiers.quantization import QuantizationMixin
from llmcompressor.modifiers.transform import AWQModifier, QuIPModifier, SmoothQuantModifier, SpinQuantModifier
from torch import nn

from elsa_modifier.quantization.llmcompressor_gptq import check_internals

__all__ = ["check_recipe", "check_unquantized", "following", "keep_in_recipe_file", "trains"]

_GROUPED = (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP)


def trains(modifier: Modifier) -> bool:
    """Whether it is an ELSAModifier, whose module imports this one."""
    return any(cls.__name__ == "ELSAModifier" for cls in type(modifier).__mro__)


def following(modifier: Modifier, modifiers: Sequence[Modifier]) -> list[Modifier]:
    """Those that come after one in a recipe."""
    # Two modifiers with the same fields are equal.
    place = next((i for i, other in enumerate(modifiers) if other is modifier), len(modifiers))
    return list(modifiers[place + 1 :])


def check_recipe(modifiers: Sequence[Modifier], model: nn.Module) -> None:
    """Check modifiers in the order in which they will run, against each other and the model.

    :raises ValueError: if a modifier would undo what one before it has done, or could not run after it; the message
        says which two and what to change
    :raises RuntimeError: if llm-compressor's GPTQ is not the one this package was written for
    """
    for place, later in enumerate(modifiers):
        for earlier in modifiers[:place]:
            _check_pair(earlier, later, model)
        if isinstance(later, (QuIPModifier, SpinQuantModifier)) and any(map(trains, modifiers)):
            raise ValueError(
                f"{_name(later)} rotates weights, which mixes pruned ones with kept ones: no zero would be left. Take "
                "it out of the recipe; SmoothQuantModifier and AWQModifier only scale, and keep zeros"
            )
    for place, modifier in enumerate(modifiers):
        if isinstance(modifier, QuantizationMixin):
            _check_quantizer(modifier, modifiers[:place], model)


def check_unquantized(model: nn.Module) -> None:
    """Check that no weight is on a grid that training would leave.

    :raises ValueError: names the first module that is quantized
    """
    quantized = next((name for name, module in model.named_modules() if hasattr(module, "quantization_scheme")), None)
    if quantized is not None:
        raise ValueError(f"{quantized} is quantized already, and pruning trains the weights; load an unquantized model")


def keep_in_recipe_file(modifiers: Sequence[Modifier]) -> None:
    """Rename groups so that the recipe.yaml which llm-compressor writes has every modifier, in order.

    It is a mapping, in which the second modifier of a type in a group would replace the first.
    """
    seen: set[tuple[str | None, str]] = set()
    copies = 0
    for modifier in modifiers:
        if (modifier.group, _name(modifier)) in seen:
            copies += 1
        if copies:
            modifier.group = f"{modifier.group or 'default'}_{copies}"
        seen.add((modifier.group, _name(modifier)))


def _check_pair(earlier: Modifier, later: Modifier, model: nn.Module) -> None:
    first, second = _name(earlier), _name(later)
    if isinstance(earlier, QuantizationMixin):
        if trains(later):
            raise ValueError(
                f"{first} comes before {second}, which trains weights and would leave none on the grid; put "
                "ELSAModifier first in the recipe"
            )
        if isinstance(later, (SmoothQuantModifier, AWQModifier)):
            raise ValueError(f"{second} would scale what {first} has quantized before it; put {second} before {first}")
        if isinstance(later, SparsityModifierBase):
            _refuse_shared(
                _quantized(earlier, model),
                _pruned(later, model),
                f"{second} would prune {{}}, which {first} has quantized before it; put {second} before {first}",
            )
        if isinstance(later, QuantizationMixin):
            _refuse_shared(
                _quantized(earlier, model),
                _quantized(later, model),
                f"{first} and {second} both quantize {{}}, and llm-compressor would give it the scheme of the last in "
                "both; take one out of the recipe, or part the modules by targets and ignore",
            )
    if trains(later) and _prunes(earlier):
        _refuse_shared(
            _pruned(earlier, model),
            {name for name, _ in model.named_modules()} - _pruned(later, model),
            f"{first} prunes {{}}, which {second} after it trains but does not prune, so that its zeros would be lost; "
            f"leave it out of {first} by ignore, for example 're:.*lm_head', or have {second} prune it too",
        )
    if trains(earlier) and isinstance(later, REAPPruningModifier):
        raise ValueError(
            f"{second} removes experts and numbers the others anew, and {first} holds zeros by name; put {second} "
            f"before {first}"
        )
    if trains(earlier) and isinstance(later, SparsityModifierBase):
        _refuse_shared(
            _pruned(earlier, model),
            _pruned(later, model),
            f"{second} would choose a second mask for {{}}, which {first} has pruned before it, and neither sparsity "
            f"would be met; put {second} before {first}, or take it out and set the sparsity of {first}",
        )


def _check_quantizer(modifier: QuantizationMixin, before: Sequence[Modifier], model: nn.Module) -> None:
    # MaskedGPTQModifier's preset schemes, which are made to fit.
    fit = getattr(modifier, "fit_groups", None)
    if fit is not None:
        fit(model)
    schemes = _schemes(modifier, model)
    if isinstance(modifier, GPTQModifier):
        check_internals()
        earlier = [_schemes(other, model) for other in before if isinstance(other, QuantizationMixin)]
        if not any(scheme.weights for found in [schemes, *earlier] for scheme in found.values()):
            raise ValueError(
                f"{_name(modifier)} has no weight to quantize: set scheme, for example W4A16, or weights in "
                "config_groups, and targets that match modules of the model"
            )
    unfit: dict[str, tuple[int, int]] = {}
    with disable_onloading():
        for name, scheme in schemes.items():
            width = int(model.get_submodule(name).weight.shape[-1])  # type: ignore[index]
            if scheme.weights and scheme.weights.strategy in _GROUPED and width % scheme.weights.group_size:
                unfit[name] = (width, scheme.weights.group_size)
    if unfit:
        name, (width, size) = next(iter(unfit.items()))
        common = math.gcd(*(width for width, _ in unfit.values()))
        raise ValueError(
            f"group_size of {_name(modifier)} is {size}, which does not divide the {width} columns of {name}"
            f"{f' (and {len(unfit) - 1} more weights do not fit)' if len(unfit) > 1 else ''}; allowed is what divides "
            f"{common}, in config_groups. Or list what does not fit in ignore, or use strategy channel"
        )


def _refuse_shared(first: set[str], second: set[str], message: str) -> None:
    shared = sorted(first & second)
    if shared:
        raise ValueError(message.format(f"{shared[0]}{f' and {len(shared) - 1} more' if len(shared) > 1 else ''}"))


def _name(modifier: object) -> str:
    return type(modifier).__name__


def _prunes(modifier: Modifier) -> bool:
    return trains(modifier) or isinstance(modifier, SparsityModifierBase)


def _quantized(modifier: QuantizationMixin, model: nn.Module) -> set[str]:
    return set(_schemes(modifier, model))


def _schemes(modifier: QuantizationMixin, model: nn.Module) -> dict[str, QuantizationScheme]:
    """By the name of each module to which the modifier will give one, as ``apply_quantization_config`` does."""
    # A GPTQModifier without one takes the schemes of a quantizer before it.
    if not QuantizationMixin.has_config(modifier):
        return {}
    by_target = {t: s for s in modifier.resolved_config.config_groups.values() for t in s.targets}
    return {
        name: by_target[match_targets(name, module, by_target)[0]]
        for name, module in match_named_modules(model, by_target, modifier.ignore)
        if isinstance(module, (nn.Linear, nn.Embedding))
    }


def _pruned(modifier: Modifier, model: nn.Module) -> set[str]:
    """Names of the modules that a modifier prunes."""
    if trains(modifier):
        return {target.name for target in modifier._find_targets(model)}
    assert isinstance(modifier, SparsityModifierBase)
    found = set()
    for outer, layer in match_named_modules(model, _as_list(modifier.targets)):
        for inner, module in match_named_modules(layer, PRUNABLE_LAYER_TYPES):
            # With a dot at the end where the target is the module itself: what its ignore is compared with.
            name = f"{outer}.{inner}"
            if not match_targets(name, module, _as_list(modifier.ignore)) and not isinstance(module, nn.Embedding):
                found.add(name.rstrip("."))
    return found


def _as_list(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
