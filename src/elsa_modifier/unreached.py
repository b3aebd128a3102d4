"""Targets that the text never reaches: a vision tower, an expert without a token."""

import re
from collections import Counter
from collections.abc import Sequence

from loguru import logger

__all__ = ["summarized", "warn_of_unreached"]

_LINES = 8


def summarized(names: Sequence[str]) -> str:
    """Module names in few words: those that differ in numbers alone are one, with how many they are."""
    patterns = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names)
    single = {pattern: name for name in names if patterns[pattern := re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)] == 1}
    words = [single.get(pattern, f"{pattern} ({count})") for pattern, count in patterns.items()]
    if len(words) > _LINES:
        words = [*words[:_LINES], f"{len(words) - _LINES} more such"]
    return ", ".join(words)


def warn_of_unreached(names: Sequence[str], *, targets: int, pruned: bool) -> None:
    """Say which targets had no gradient in the whole run, if any.

    :param names: of these
    :param targets: how many there are in all
    :param pruned: whether they were pruned nevertheless
    :raises RuntimeError: if all had none, and so none was pruned
    """
    if not names:
        return
    said = f"{len(names)} of {targets} targets had no gradient in the whole run: {summarized(names)}"
    if pruned:
        logger.warning(f"{said}. They were pruned by magnitude, as prune_unreached asks.")
    elif len(names) < targets:
        logger.warning(
            f"{said}. They are as they were; set prune_unreached to prune them by magnitude, or list them in ignore."
        )
    else:
        raise RuntimeError(f"{said}. Nothing was pruned; name modules in targets that the text reaches")
