"""``sweep.json``: what a sweep is of, and the points that it has."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from elsa_modifier.evaluating.record import Evaluation
from elsa_modifier.whole_files import write_whole
from elsa_sparse.errors import printable

__all__ = ["SWEEP_FILE", "Point", "Sweep"]

SWEEP_FILE = "sweep.json"
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Point:
    """A model that was pruned and judged.

    :param sparsity: that was asked for, a fraction
    :param directory: of the model, in the sweep's
    """

    sparsity: float = Field(ge=0, lt=1)
    directory: str
    evaluation: Evaluation


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Sweep:
    """A model at several sparsities.

    :param settings: what every point depends on but its sparsity: the recipe's fields, the text's key
    :param dense: the model as it was, judged on the same texts; None until it is
    :param points: the finished ones, by rising sparsity
    """

    model: str
    settings: dict[str, Any]
    dense: Evaluation | None = None
    points: tuple[Point, ...] = ()
    format: int = Field(default=1, ge=1, le=1)

    @classmethod
    def read(cls, directory: Path) -> "Sweep":
        """Out of a directory.

        :raises OSError: if there is none
        :raises ValueError: if the file is not what :meth:`write` writes
        """
        file = directory / SWEEP_FILE
        try:
            return _ADAPTER.validate_json(file.read_bytes())
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise ValueError(
                f"{printable(file)}: {printable(where, 200)}: {printable(first['msg'], 300)}. It is not a sweep of "
                "this version of elsa-modifier; move it away, or name another --out"
            ) from error

    def write(self, directory: Path) -> None:
        """Into a directory, all at once.

        :raises OSError: if it cannot be written
        """
        write_whole(directory / SWEEP_FILE, _ADAPTER.dump_json(self, indent=1).decode() + "\n")

    def differences(self, model: str, settings: Mapping[str, Any]) -> list[str]:
        """What differs from another sweep's model and settings, in words."""
        from elsa_modifier.resuming.fingerprint import differences

        before = {"model": self.model, **_flat(self.settings)}
        return differences(before, {"model": model, **_flat(settings)})


_ADAPTER = TypeAdapter(Sweep)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**settings.get("recipe", {}), **{key: value for key, value in settings.items() if key != "recipe"}}
