"""Every recipe in the repository parses, and the published ones run what the authors ran."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from llmcompressor.recipe import Recipe

import elsa_modifier

RECIPES = Path(__file__).parent.parent / "recipes"

# What the authors ran on. Their code divides the lam that they print by it, and gradients are averaged all the same.
GPUS = {
    "opt-125m": 1,
    "opt-1.3b": 2,
    "gemma-2-2b": 2,
    "llama-3.2-3b": 2,
    "llama-2-7b": 4,
    "llama-2-13b": 4,
    "gemma-2-27b": 4,
}
# arXiv 2510.01650: learning rate and lam, as printed, by sparsity (50, 60, 70, 80, 90%), and the penalty's schedule.
PUBLISHED = {
    "opt-125m": ([1e-5, 5e-5, 1e-4, 2e-4, 2e-4], [1e-2, 5e-3, 2e-3, 1e-3, 1e-3], "constant"),
    "opt-1.3b": ([5e-5, 5e-5, 5e-5, 1e-4, 1e-4], [1e-1, 1e-2, 5e-3, 1e-3, 1e-3], "cosine"),
    "gemma-2-2b": ([2e-5, 2e-5, 2e-5, 2e-5, 5e-5], [2e-1, 1e-2, 1e-2, 5e-3, 5e-4], "constant"),
    "llama-3.2-3b": ([5e-5, 5e-5, 5e-5, 1e-4, 1e-4], [1e-1, 1e-2, 5e-3, 1e-3, 1e-3], "cosine"),
    "llama-2-7b": ([5e-5, 5e-5, 5e-5, 5e-5, 1e-4], [1e-1, 2e-2, 2e-2, 2e-2, 1e-3], "cosine"),
    "llama-2-13b": ([5e-5, 5e-5, 5e-5, 5e-5, 5e-5], [2e-1, 2e-1, 2e-2, 5e-2, 2e-3], "cosine"),
}


def assert_penalty(path, recipe, *, printed, gpus, schedule):
    """It is the printed one over the GPUs, and the file says so."""
    assert recipe.penalty.model_dump() == {
        "value": printed / gpus,
        "schedule": schedule,
        "form": "coupled",
        "dual": False,
    }
    assert (recipe.objective.name, recipe.sparsity_schedule.name) == ("next_token", "constant")
    assert recipe._budget() is None
    words = " ".join(re.findall(r"^# (.*)$", path.read_text(), flags=re.MULTILINE))
    lam, count, value, _ = re.search(
        r"Printed lam (\S+); the authors' code divides it by its GPUs, (\d+) .*?, so penalty.value is (\S+)\.( |$)",
        words,
    ).groups()
    assert (float(lam), int(count), float(value)) == (printed, gpus, printed / gpus)


def modifier(path):
    (modifier,) = Recipe.create_instance(str(path)).modifiers
    assert isinstance(modifier, elsa_modifier.ELSAModifier)
    return modifier


def test_every_recipe_quotes_what_llmcompressor_says_without_the_import():
    script = f"from llmcompressor.recipe import Recipe; Recipe.create_instance({str(RECIPES / 'elsa_90.yaml')!r})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    message = run.stderr.strip().splitlines()[-1].removeprefix("ValueError: ")
    assert message == "No modifier of type 'ELSAModifier' found."
    hint = f'# `import elsa_modifier` comes before `oneshot`; without it: "{message}"\n'
    for path in RECIPES.rglob("*.yaml"):
        assert hint in path.read_text(), path


@pytest.mark.parametrize("percent", [50, 60, 70, 80, 90, 95])
def test_unstructured_recipes(percent):
    assert modifier(RECIPES / f"elsa_{percent}.yaml").sparsity == percent / 100


@pytest.mark.parametrize("zeroed,size", [(2, 4), (4, 8)])
def test_structured_recipes(zeroed, size):
    assert modifier(RECIPES / f"elsa_{zeroed}of{size}.yaml").mask_structure == f"{zeroed}:{size}"


@pytest.mark.parametrize("percent", [50, 80, 90])
@pytest.mark.parametrize("scheme", ["W4A16", "W8A8"])
def test_recipes_that_quantize(percent, scheme):
    path = RECIPES / f"elsa_{percent}_{scheme.lower()}.yaml"
    elsa, gptq = Recipe.create_instance(str(path)).modifiers
    assert isinstance(elsa, elsa_modifier.ELSAModifier) and elsa.sparsity == percent / 100
    assert isinstance(gptq, elsa_modifier.MaskedGPTQModifier)
    assert (gptq.scheme, gptq.ignore, gptq.targets) == (scheme, ["lm_head"], ["Linear"])


@pytest.mark.parametrize("percent", [80, 90])
def test_recipes_for_little_memory(percent):
    recipe = modifier(RECIPES / f"elsa_l_{percent}.yaml")
    assert recipe.sparsity == percent / 100
    assert (recipe.weight_dtype, recipe.optimizer, recipe.state_dtype) == ("bf16", "adam8bit_sr", "fp32")
    assert recipe.activation_checkpointing


def test_the_published_recipe_for_little_memory():
    path = RECIPES / "paper" / "gemma-2-27b.yaml"
    recipe = modifier(path)
    assert (recipe.sparsity, recipe.lr, recipe.steps, recipe.sequence_length) == (0.9, 2e-5, 4096, 2048)
    assert_penalty(path, recipe, printed=2e-3, gpus=GPUS["gemma-2-27b"], schedule="cosine")
    assert recipe.batch_size * recipe.gradient_accumulation_steps == 8
    assert (recipe.optimizer, recipe.state_dtype) == ("adam8bit", "bf16")


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_recipes(model):
    rates, penalties, schedule = PUBLISHED[model]
    columns = [(f"elsa_{percent}", i) for i, percent in enumerate((50, 60, 70, 80, 90))]
    for file, column in [*columns, ("elsa_2of4", 0), ("elsa_4of8", 0)]:
        path = RECIPES / "paper" / model / f"{file}.yaml"
        recipe = modifier(path)
        assert recipe.lr == rates[column], file
        assert_penalty(path, recipe, printed=penalties[column], gpus=GPUS[model], schedule=schedule)
        fields = recipe.model_dump(include={"lr_schedule", "warmup_steps", "optimizer", "betas", "interval", "steps"})
        assert fields == {
            "lr_schedule": "linear",
            "warmup_steps": 0,
            "optimizer": "adam",
            "betas": [0.9, 0.999],
            "interval": 32,
            "steps": 4096,
        }
        assert recipe.batch_size * recipe.gradient_accumulation_steps == 8
        assert (recipe.sequence_length, recipe.max_grad_norm, recipe.precision) == (2048, 1.0, "bf16")
        assert (recipe.finalize_at, recipe.projection) == (1.0, "fisher")
    assert recipe.mask_structure == "4:8"


def test_no_recipe_is_left_untested():
    tested = 6 + 2 + 3 * 2 + 2 + len(PUBLISHED) * 7 + 1
    assert len(list(RECIPES.rglob("*.yaml"))) == tested
