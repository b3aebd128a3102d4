"""Write docs/recipe_reference.md from the fields of ELSAModifier: names, types, defaults, and what docstrings say.

python -m docs.tools.recipe_reference
"""

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from elsa_modifier import ELSAModifier
from elsa_modifier.deprecation import Renamed
from elsa_modifier.fields import CHANGED_FIELDS, Budget, CheckpointEvery, Penalty, Tightening, TrainingObjective
from elsa_modifier.named_recipes import recipes

__all__ = ["PAGE", "page"]

PAGE = Path(__file__).parents[1] / "recipe_reference.md"

_GROUPS = {
    "What is pruned": ("sparsity", "mask_structure", "shared_budget", "targets", "ignore", "prune_unreached"),
    "How long, on what": ("steps", "batch_size", "gradient_accumulation_steps", "sequence_length", "seed"),
    "What is minimized, and how": (
        *("objective", "lr", "lr_schedule", "warmup_steps", "betas", "max_grad_norm", "optimizer"),
    ),
    "How weights become zero": ("sparsity_schedule", "interval", "penalty", "projection", "finalize"),
    "Precision and memory": (
        *("precision", "weight_dtype", "state_dtype", "gradient_release", "offload_state"),
        *("activation_checkpointing", "parallel"),
    ),
    "What is written": (*("checkpoint", "checkpoint_every", "checkpoint_dir", "checkpoint_keep", "resume", "track"),),
}
_YAML = {"None": "null", "True": "true", "False": "false"}
_NESTED: dict[str, type[BaseModel]] = {
    "objective": TrainingObjective,
    "sparsity_schedule": Tightening,
    "penalty": Penalty,
    "shared_budget": Budget,
    "checkpoint_every": CheckpointEvery,
}


def page() -> str:
    """The page.

    :raises ValueError: if a field of ELSAModifier is in no group, or has no description
    """
    fields = {_name(name): field for name, field in ELSAModifier.model_fields.items() if name in _own_fields()}
    described = _descriptions(ELSAModifier)
    if missing := fields.keys() ^ {name for names in _GROUPS.values() for name in names}:
        raise ValueError(f"{sorted(missing)}: every field of ELSAModifier belongs to one group of {__file__}")
    own = [name for name in recipes() if "/" not in name]
    lines = [
        "# Recipe reference",
        "",
        "The fields of `ELSAModifier`. All but `sparsity` have defaults that need no tuning. Written by "
        "`python -m docs.tools.recipe_reference` from the code.",
        "",
        "```yaml",
        "prune_stage:",
        "  prune_modifiers:",
        "    ELSAModifier:",
        "      sparsity: 0.9",
        "```",
        "",
        f"Recipes that come with the package, by name: {', '.join(f'`{name}`' for name in own)}; and the published "
        "settings under `paper/`, such as `paper/llama-2-7b/elsa_50`.",
    ]
    for title, names in _GROUPS.items():
        lines += ["", f"## {title}", ""]
        lines += _table((name, fields[name], described[_attribute(name)]) for name in names)
        for name in names:
            if name in _NESTED:
                lines += ["", f"### {name}", "", *_nested(_NESTED[name])]
    lines += ["", "## Old names", ""]
    lines += [
        f"- `{name}` is called `{change.to}` now; the old name works until {change.until}"
        if isinstance(change, Renamed)
        else f"- `{name}` is refused: {change.instead}"
        for name, change in CHANGED_FIELDS.items()
    ]
    return "\n".join(lines) + "\n"


def _own_fields() -> set[str]:
    """Those that are not every modifier's."""
    return set(ELSAModifier.__annotations__) & set(ELSAModifier.model_fields)


def _name(attribute: str) -> str:
    return "finalize" if attribute == "finalize_at" else attribute


def _attribute(name: str) -> str:
    return "finalize_at" if name == "finalize" else name


def _nested(model: type[BaseModel]) -> list[str]:
    described = _descriptions(model)
    intro = inspect.getdoc(model) or ""
    text = _markdown(intro.partition("\n\n:param")[0].replace("\n\n", "\n"))
    return [text, "", *_table((name, field, described[name]) for name, field in model.model_fields.items())]


def _table(rows: Iterator[tuple[str, FieldInfo, str]]) -> list[str]:
    lines = ["| field | type | default | |", "|---|---|---|---|"]
    for name, field, text in rows:
        kind, default = _type(field.annotation, field), _default(field)
        lines.append(f"| `{name}` | {kind} | {default} | {text} |")
    return lines


def _descriptions(model: type) -> dict[str, str]:
    """What a class's docstring says of each parameter; names may stand together in one line."""
    found: dict[str, str] = {}
    for match in re.finditer(
        r"^:param ([\w, ]+): (.*?)(?=^:|\Z)", inspect.getdoc(model) or "", re.DOTALL | re.MULTILINE
    ):
        for name in match[1].split(","):
            found["finalize_at" if name.strip() == "finalize" else name.strip()] = _markdown(match[2])
    return found


def _markdown(text: str) -> str:
    text = re.sub(r":class:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", " ".join(text.split()))
    text = re.sub(r"see `(TrainingObjective|Tightening|Penalty|Budget|CheckpointEvery)`", "see below", text)
    text = re.sub(r"\(docs/(\w+)\.md", r"([\1.md](\1.md)", text)
    text = re.sub(r":mod:`([\w.]+)`", r"`\1`", text).replace("``", "`").replace("|", "\\|")
    return re.sub(r"\b(None|True|False)\b", lambda match: f"`{_YAML[match[1]]}`", text)


def _type(annotation: Any, field: FieldInfo) -> str:
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return " or ".join(_type(kind, field) for kind in get_args(annotation))
    if origin is Literal:
        return ", ".join(f"`{json.dumps(value).strip(chr(34))}`" for value in get_args(annotation))
    if origin is list:
        return f"list of {_type(get_args(annotation)[0], field)}"
    if origin is dict:
        return f"mapping of patterns to {_type(get_args(annotation)[1], field)}"
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "fields"
    names = {float: "number", int: "integer", str: "text", bool: "true or false"}
    return names[annotation] + _bounds(field)


def _bounds(field: FieldInfo) -> str:
    """Limits of a number, as far as the field itself has them."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    limits = [
        f"{sign} {getattr(limit, name):g}"
        for limit in field.metadata
        for name, sign in signs.items()
        if getattr(limit, name, None) is not None
    ]
    return f" {', '.join(limits)}" if limits else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        value = value.model_dump()
        return "`{" + ", ".join(f"{name}: {json.dumps(inner).strip(chr(34))}" for name, inner in value.items()) + "}`"
    if isinstance(value, str):
        return f"`{value}`"
    return f"`{json.dumps(value)}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
