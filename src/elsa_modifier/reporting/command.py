"""What ``elsa report`` does, for the command line to call."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from elsa_modifier.reporting.card import write_card
from elsa_modifier.reporting.facts import gather
from elsa_modifier.reporting.page import build_page
from elsa_modifier.whole_files import write_whole
from elsa_sparse.checkpoint import CONFIG_FILE
from elsa_sparse.model_card import CARD_FILE

__all__ = ["PAGE_FILE", "Report", "run"]

PAGE_FILE = "index.html"


@dataclass(frozen=True)
class Report:
    """What was written.

    :param figures: PNG files
    :param card: the model card; None if somebody else's is there, or none was asked for
    """

    page: Path
    figures: tuple[Path, ...]
    card: Path | None


def run(
    directory: Path,
    others: Sequence[Path] = (),
    *,
    out: Path | None = None,
    card: bool = True,
    base_model: str | None = None,
    progress: bool = True,
) -> Report:
    """Write the page, its figures and the model card.

    :param directory: of a model; or one that holds several such, as of a sweep, of which the first is reported and the
        others are compared with it
    :param others: directories that the first is compared with, of either kind
    :param out: directory of the page and its figures; None is beside the model, with ``-report`` at the end
    :param card: whether to write the model card, if there is none but one that this package wrote
    :param base_model: name of the dense model on the hub, for the card
    :raises ValueError, OSError: if a directory cannot be read, or the report not be written
    :raises ImportError: if what draws is not installed
    """
    directories = [found for given in (directory, *others) for found in _checkpoints(given)]
    facts, *rest = [gather(found, progress=progress) for found in dict.fromkeys(directories)]
    page, drawings = build_page(facts, rest)
    out = out or directory.with_name(f"{directory.resolve().name}-report")
    out.mkdir(parents=True, exist_ok=True)
    figures = []
    for drawing in drawings:
        figures.append(out / f"{drawing.name}.png")
        write_whole(figures[-1], drawing.png)
    write_whole(out / PAGE_FILE, page)
    written = card and write_card(facts, base_model)
    return Report(page=out / PAGE_FILE, figures=tuple(figures), card=facts.directory / CARD_FILE if written else None)


def _checkpoints(directory: Path) -> list[Path]:
    """The directory, or those in it that hold a model, by name."""
    if (directory / CONFIG_FILE).exists():
        return [directory]
    return sorted(file.parent for file in directory.glob(f"*/{CONFIG_FILE}")) or [directory]
