"""Fields that recipes once had: renamed ones still work, with a warning, and removed ones say what to write instead.

A field stays in these tables for two minor versions. Who reads an old recipe learns what it has become, and not only
that it is not a field.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Removed", "Renamed", "with_current_names"]


@dataclass(frozen=True)
class Renamed:
    """A field that has another name now.

    :param to: the name
    :param until: the version in which the old name goes
    """

    to: str
    until: str


@dataclass(frozen=True)
class Removed:
    """A field that is no more.

    :param instead: why, and what to write; a sentence that follows the field and its value
    """

    instead: str


def with_current_names(fields: Any, changes: Mapping[str, Renamed | Removed], prefix: str = "") -> Any:
    """Fields of a recipe, not validated yet, under the names that they have now.

    :param prefix: of the names in messages, such as ``penalty.``
    :returns: a copy, if anything had to be renamed; what is no mapping as it is
    :raises ValueError: for a field that was removed, or that is there under its old name and its new one
    """
    if not isinstance(fields, Mapping):
        return fields
    old = {name: changes[name] for name in changes if name in fields}
    removed = {name: change for name, change in old.items() if isinstance(change, Removed)}
    if removed:
        # Several that one sentence answers are answered once.
        first = next(iter(removed.values()))
        given = ", ".join(f"{prefix}{name}: {fields[name]}" for name, change in removed.items() if change == first)
        raise ValueError(f"{given}: {first.instead}")
    current = dict(fields)
    for name, change in old.items():
        assert isinstance(change, Renamed)
        if change.to in current:
            raise ValueError(
                f"{prefix}{name} is the old name of {prefix}{change.to}, and both are set; leave {prefix}{name} out"
            )
        warnings.warn(
            f"{prefix}{name} is called {prefix}{change.to} now; the old name works until elsa-modifier {change.until}",
            FutureWarning,
            stacklevel=2,
        )
        current[change.to] = current.pop(name)
    return current if old else fields
