"""Every recipe in the repository parses, and the published ones say what was published."""

from pathlib import Path

import pytest
from llmcompressor.recipe import Recipe

import elsa_modifier

RECIPES = Path(__file__).parent.parent / "recipes"

# arXiv 2510.01650: learning rate and lam by sparsity (50, 60, 70, 80, 90%), and the penalty's schedule.
PUBLISHED = {
    "opt-125m": ([1e-5, 5e-5, 1e-4, 2e-4, 2e-4], [1e-2, 5e-3, 2e-3, 1e-3, 1e-3], "constant"),
    "opt-1.3b": ([5e-5, 5e-5, 5e-5, 1e-4, 1e-4], [1e-1, 1e-2, 5e-3, 1e-3, 1e-3], "cosine"),
    "gemma-2-2b": ([2e-5, 2e-5, 2e-5, 2e-5, 5e-5], [2e-1, 1e-2, 1e-2, 5e-3, 5e-4], "constant"),
    "llama-3.2-3b": ([5e-5, 5e-5, 5e-5, 1e-4, 1e-4], [1e-1, 1e-2, 5e-3, 1e-3, 1e-3], "cosine"),
    "llama-2-7b": ([5e-5, 5e-5, 5e-5, 5e-5, 1e-4], [1e-1, 2e-2, 2e-2, 2e-2, 1e-3], "cosine"),
    "llama-2-13b": ([5e-5, 5e-5, 5e-5, 5e-5, 5e-5], [2e-1, 2e-1, 2e-2, 5e-2, 2e-3], "cosine"),
}


def modifier(path):
    (modifier,) = Recipe.create_instance(str(path)).modifiers
    assert isinstance(modifier, elsa_modifier.ELSAModifier)
    return modifier


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
    assert (recipe.weight_dtype, recipe.optimizer, recipe.state_dtype) == ("bf16", "adam8bit_sr", "int8")
    assert recipe.activation_checkpointing


def test_the_published_recipe_for_little_memory():
    recipe = modifier(RECIPES / "paper" / "gemma-2-27b.yaml")
    assert (recipe.sparsity, recipe.lr, recipe.steps, recipe.sequence_length) == (0.9, 2e-5, 4096, 2048)
    assert recipe.penalty.model_dump() == {
        "value": 2e-3,
        "schedule": "cosine",
        "form": "coupled",
        "free_support": False,
    }
    assert recipe.batch_size * recipe.gradient_accumulation_steps == 8
    assert (recipe.optimizer, recipe.dual_dtype, recipe.split_dtype) == ("adam8bit", "bf16", "float8_e4m3fn")


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_recipes(model):
    rates, penalties, schedule = PUBLISHED[model]
    columns = [(f"elsa_{percent}", i) for i, percent in enumerate((50, 60, 70, 80, 90))]
    for file, column in [*columns, ("elsa_2of4", 0), ("elsa_4of8", 0)]:
        recipe = modifier(RECIPES / "paper" / model / f"{file}.yaml")
        assert (recipe.lr, recipe.penalty.value) == (rates[column], penalties[column]), file
        assert recipe.penalty.model_dump() == {
            "value": penalties[column],
            "schedule": schedule,
            "form": "coupled",
            "free_support": False,
        }
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
