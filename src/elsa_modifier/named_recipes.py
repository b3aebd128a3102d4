"""The recipes that come with the package, by name: beside this file once installed, at the root of a checkout."""

from difflib import get_close_matches
from pathlib import Path

__all__ = ["find_recipe", "recipe", "recipes"]


def recipes() -> list[str]:
    """Names of all recipes that come with the package, such as ``elsa_90`` and ``paper/llama-2-7b/elsa_50``."""
    root = _directory(Path(__file__).parent)
    return sorted(file.relative_to(root).with_suffix("").as_posix() for file in root.rglob("*.yaml"))


def recipe(name: str) -> str:
    """Path of a recipe that comes with the package, as ``oneshot(recipe=...)`` takes it.

    :param name: one of :func:`recipes`
    :raises ValueError: if there is none of this name; the message lists those there are
    """
    names = recipes()
    if name not in names:
        near = get_close_matches(name, names)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"no recipe is called {name!r}; {hint}There are {', '.join(names)}")
    return str(_directory(Path(__file__).parent) / f"{name}.yaml")


def find_recipe(path_or_name: str | Path) -> Path:
    """A recipe file, or else the recipe of that name.

    :raises ValueError: if it is neither
    """
    path = Path(path_or_name)
    if path.is_file():
        return path
    try:
        return Path(recipe(str(path_or_name)))
    except ValueError as error:
        raise ValueError(f"{path_or_name} is not a file, and {error}") from error


def _directory(package: Path) -> Path:
    """Where the recipes of a package lie: the wheel puts them inside, see pyproject.toml.

    :param package: directory of ``elsa_modifier``
    """
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parents[1] / "recipes"
