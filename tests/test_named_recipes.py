"""Recipes are found by name, from any directory, in a checkout and in an installed package."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from llmcompressor.recipe import Recipe

import elsa_modifier
from elsa_modifier import named_recipes
from elsa_modifier.planning.settings import modifier_of_recipe

ROOT = Path(__file__).parent.parent


def test_every_recipe_has_a_name_that_finds_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    files = {Path(elsa_modifier.recipe(name)).resolve() for name in elsa_modifier.recipes()}
    assert files == {file.resolve() for file in (ROOT / "recipes").rglob("*.yaml")}
    assert {"elsa_90", "elsa_2of4", "paper/llama-2-7b/elsa_50", "paper/gemma-2-27b"} <= set(elsa_modifier.recipes())
    (modifier,) = Recipe.create_instance(elsa_modifier.recipe("elsa_90")).modifiers
    assert modifier.sparsity == 0.9


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_an_installed_package_has_them_where_they_are_looked_for(monkeypatch, tmp_path):
    import tomllib

    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for source, inside in wheel["force-include"].items():
        shutil.copytree(ROOT / source, tmp_path / inside)
    installed = tmp_path / "elsa_modifier" / "named_recipes.py"
    names = elsa_modifier.recipes()
    monkeypatch.setattr(named_recipes, "__file__", str(installed))
    assert elsa_modifier.recipes() == names
    assert Path(elsa_modifier.recipe("elsa_80")) == tmp_path / "elsa_modifier" / "recipes" / "elsa_80.yaml"


@pytest.mark.parametrize("name", ["elsa_9", "elsa_90.yaml", "recipes/elsa_90", "../recipes/elsa_90", ""])
def test_an_unknown_name_lists_those_there_are(name):
    with pytest.raises(ValueError, match=re.escape(f"no recipe is called {name!r}; ")) as raised:
        elsa_modifier.recipe(name)
    assert ", elsa_90, " in str(raised.value)
    if name.startswith("elsa_9"):
        assert re.search(r"did you mean [^?]*\belsa_90\b[^?]*\?", str(raised.value))


def test_a_plan_takes_a_name_or_a_file(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert modifier_of_recipe("elsa_90").sparsity == modifier_of_recipe(Path("elsa_90")).sparsity == 0.9
    (tmp_path / "elsa_90").write_text((ROOT / "recipes" / "elsa_50.yaml").read_text())
    assert modifier_of_recipe("elsa_90").sparsity == 0.5
    with pytest.raises(ValueError, match="elsa_91 is not a file, and no recipe is called 'elsa_91'; did you mean"):
        modifier_of_recipe("elsa_91")
