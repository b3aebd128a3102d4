"""Sparsities that another program chose layer by layer, as the mapping that the field ``sparsity`` takes.

EvoPress (github.com/IST-DASLab/EvoPress) writes lines ``module: level``. A level is no fraction: it stands for a matrix
with ``level * weights_diff`` zeros more than ``sparsity`` of it. OWL (github.com/luuyin/OWL) has one number a decoder
layer, of weights that are kept.
"""

import math
import re
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from elsa_modifier.planning.sources import config_of
from elsa_sparse.files import read_bounded

__all__ = ["sparsity_mapping"]

_MAX_BYTES = 10**7


def sparsity_mapping(
    file: str | Path,
    model: str | Path | PreTrainedModel,
    *,
    sparsity: float | None = None,
    weights_diff: int | None = None,
    kept: bool = False,
) -> dict[str, float]:
    """Fractions of zeros by module name, as ``ELSAModifier(sparsity=...)`` takes them.

    :param file: lines ``module: fraction`` or, as EvoPress writes them, ``module: level``; or a list, one number for
        each decoder layer, in brackets or not, with commas or not, which holds for every Linear of the layer
    :param model: whose modules those are: a directory with a ``config.json``, a name on the hub, or the model
    :param sparsity, weights_diff: what EvoPress's ``prune.py`` was given, for a file of levels and for no other
    :param kept: the numbers say how much stays, as OWL's do, and not how much becomes zero
    :raises ValueError: if a line or number cannot be read, a module is not the model's, there is not one number for
        each layer, a fraction is not within 0 <= f < 1, or levels come without ``sparsity`` and ``weights_diff``
    """
    path = Path(file)
    text = read_bounded(path, _MAX_BYTES).decode("utf-8", errors="replace")
    if not isinstance(model, PreTrainedModel):
        config = config_of(str(model))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    if ":" not in text:
        return _by_layer(path, text, model, kept)
    given = _by_module(path, text, model)
    levels = all(re.fullmatch(r"[+-]?\d+", value) for _, value in given.values())
    if levels and (sparsity is None or weights_diff is None):
        raise ValueError(
            f"{path} holds EvoPress's levels, which are no fractions; give sparsity and weights_diff as its prune.py "
            "had them"
        )
    if not levels and (sparsity, weights_diff) != (None, None):
        raise ValueError(
            f"{path} holds fractions, and sparsity and weights_diff are for a file of levels; leave them out"
        )
    mapping = {}
    for name, (line, value) in given.items():
        fraction = float(value)
        if sparsity is not None and weights_diff is not None:
            fraction = sparsity + fraction * weights_diff / _size(model, name)
        mapping[name] = _checked(fraction, kept, f"{path}, line {line} ({name}: {value})")
    return mapping


def _by_module(path: Path, text: str, model: PreTrainedModel) -> dict[str, tuple[int, str]]:
    """Line and value of each module."""
    given: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        name, _, value = (part.strip() for part in line.rpartition(":"))
        where = f"{path}, line {number} ({line.strip()[:200]!r})"
        if not name or not _is_number(value):
            raise ValueError(f"{where} is not `module: number`")
        if name in given:
            raise ValueError(f"{where}: the module was in line {given[name][0]} already")
        if not _size(model, name):
            raise ValueError(f"{where}: the model has no module of this name that has a weight matrix")
        given[name] = (number, value)
    return given


def _by_layer(path: Path, text: str, model: PreTrainedModel, kept: bool) -> dict[str, float]:
    values = text.translate(str.maketrans("[],", "   ")).split()
    if wrong := next((value for value in values if not _is_number(value)), None):
        raise ValueError(f"{path} holds {wrong[:200]!r}; allowed are a list of numbers, and lines `module: number`")
    count = model.config.get_text_config().num_hidden_layers
    if len(values) != count:
        raise ValueError(
            f"{path} holds {len(values)} numbers, and the model has {count} decoder layers; give one for each"
        )
    layers = next(name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    mapping: dict[str, float] = {}
    for i, value in enumerate(values):
        fraction = _checked(float(value), kept, f"{path}, number {i + 1} ({value})")
        prefix = f"{layers}.{i}"
        linears = [n for n, m in model.get_submodule(prefix).named_modules() if isinstance(m, nn.Linear)]
        mapping |= {f"{prefix}.{name}": fraction for name in linears}
    return mapping


def _size(model: PreTrainedModel, name: str) -> int:
    """Entries of a module's weight matrix; 0 if there is no such module, or it has none."""
    try:
        weight = getattr(model.get_submodule(name), "weight", None)
    except AttributeError:
        return 0
    return weight.numel() if isinstance(weight, torch.Tensor) and weight.ndim == 2 else 0


def _checked(fraction: float, kept: bool, where: str) -> float:
    fraction = 1 - fraction if kept else fraction
    if not 0 <= fraction < 1:
        raise ValueError(
            f"{where} makes a sparsity of {fraction:.6g}; allowed is 0 <= sparsity < 1, a fraction of zeros"
        )
    return fraction


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
