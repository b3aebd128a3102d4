"""Hostile configurations and recipes: ``elsa plan`` plans, or says in a line why it cannot."""

import json
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import given, note
from hypothesis import strategies as st
from typer.testing import CliRunner

from elsa_cli.main import app
from tests.conftest import CONFIGS
from tests.fuzzing import CASES, KINDS, as_bytes, become, cases, limits, mutated

OUTCOMES = Counter()
RECIPE = {"prune_stage": {"prune_modifiers": {"ELSAModifier": {"sparsity": 0.5, "steps": 4, "sequence_length": 16}}}}
CONFIG = {key: value for key, value in CONFIGS["llama"].to_dict().items() if value is not None}
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
RECIPES = {
    "laughs": LAUGHS + "prune_stage: {prune_modifiers: {ELSAModifier: {sparsity: *a11}}}",
    "itself": "prune_stage: &a {prune_modifiers: *a}",
    "twice": "prune_stage: {prune_modifiers: {ELSAModifier: {sparsity: 0.5, sparsity: 0.9}}}",
    "deep": "[" * 5000,
    "tag": "!!python/object/apply:os.system [true]",
    "no mapping": "prune_stage: {prune_modifiers: {ELSAModifier: 7}}",
}
NUMBERS = ["nan", "inf", "-1", "0", "1e400", "1e300", "9" * 400, "[/red]", "1", "2"]


@pytest.fixture(scope="module", autouse=True)
def outcomes():
    yield
    if CASES:
        print("\n" + "\n".join(f"{count:6} {outcome}" for outcome, count in OUTCOMES.most_common()))


def _plan(directory, recipe, options=()):
    with limits():
        result = CliRunner().invoke(app, ["plan", str(directory), "--recipe", str(recipe), *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (0, 1, 2)
    if result.exit_code == 2 and "Usage:" not in result.stderr:
        line = next(line for line in result.stderr.split("\n") if line.startswith("error: "))
        assert line.isprintable()
    OUTCOMES[f"plan: exit status {result.exit_code}"] += 1
    return result


@cases(0.03)
@given(data=st.data())
def test_hostile_configurations_and_recipes(data):
    what = data.draw(st.sampled_from(["config", "config", "config", "recipe", "recipe", "kind", "number"]))
    config = data.draw(mutated(CONFIG)) if what == "config" else CONFIG
    recipe = data.draw(mutated(RECIPE)) if what == "recipe" else RECIPE
    text = as_bytes(recipe)
    if what == "recipe" and data.draw(st.booleans()):
        text = data.draw(st.sampled_from(sorted(RECIPES.values()))).encode()
    options = []
    if what == "number":
        option = data.draw(st.sampled_from(["--gpus", "--gpu-memory", "--tflops"]))
        options = [option, data.draw(st.sampled_from(NUMBERS))]
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        (directory / "config.json").write_bytes(as_bytes(config))
        (directory / "recipe.yaml").write_bytes(text)
        if what == "kind":
            kind = data.draw(st.sampled_from(sorted(KINDS)))
            become(directory / data.draw(st.sampled_from(["config.json", "recipe.yaml"])), kind)
            note(kind)
        _plan(directory, directory / "recipe.yaml", options)


@pytest.mark.parametrize(
    "field,value,message",
    [
        ("model_type", None, "no model that transformers knows"),
        ("hidden_size", "32", "hidden_size"),
        ("hidden_size", 0, "entries: see the sizes in config.json"),
        ("hidden_size", 2**40, "entries: see the sizes in config.json"),
        ("num_hidden_layers", -2, "match no module"),
        ("num_hidden_layers", 10**9, "allowed are 1,000 layers"),
        ("num_experts", 10**9, "experts in all"),
        ("num_attention_heads", 0, "modulo by zero"),
        ("hidden_act", "nope", "nope"),
        ("architectures", 7, "architectures"),
    ],
)
def test_configurations_are_refused_in_a_line(field, value, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {field: value}))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    result = _plan(tmp_path, tmp_path / "recipe.yaml")
    assert result.exit_code == 2 and message in result.stderr, result.stderr


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_are_refused_in_a_line(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "recipe.yaml").write_text(RECIPES[name])
    result = _plan(tmp_path, tmp_path / "recipe.yaml")
    assert result.exit_code == 2 and "is not a recipe that can be used" in result.stderr, result.stderr
