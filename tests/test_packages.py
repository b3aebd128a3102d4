"""What packages need besides their code: pins that every Python of theirs can install, and the licence in each."""

from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
LINES = (ROOT / "constraints.txt").read_text().splitlines()
PINNED = [Requirement(line) for line in LINES if line and not line.startswith("#")]


def installed(pinned):
    """Metadata of the version that is pinned; None if it is not here."""
    try:
        found = metadata(pinned.name)
    except PackageNotFoundError:
        return None
    return found if pinned.specifier.contains(found["Version"], prereleases=True) else None


def test_pins_of_what_python_3_10_lacks_are_not_for_it():
    there = [(pinned, about) for pinned in PINNED if (about := installed(pinned)) is not None]
    meant = [(p, about) for p, about in there if p.marker is None or p.marker.evaluate({"python_version": "3.10"})]
    lacking = [p.name for p, about in meant if not SpecifierSet(about["Requires-Python"] or "").contains("3.10.0")]
    assert len(there) > 5 and lacking == []


def test_both_have_the_licence():
    assert (ROOT / "kernels" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
