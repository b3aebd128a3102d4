"""Every line of a plan against arithmetic by hand, for a model of 21,664 parameters."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from elsa_cli.main import app
from elsa_modifier import ELSAModifier
from elsa_modifier.planning import Planner, find_remedy, modifier_of_recipe
from tests.conftest import CONFIGS

ROOT = Path(__file__).parents[2]
GEMMA = Path(__file__).parent / "configs" / "gemma-2-27b"

# Two layers of q, o (32 x 32), k, v (16 x 32), gate, up, down (48 x 32) and two norms; the last norm; embedding, head.
LINEARS = 2 * (2 * 1024 + 2 * 512 + 3 * 1536)
NORMS = 5 * 32
EMBEDDING = 96 * 32
LARGEST = 1536


def planned(config="llama", gpus=1, capacity=10**12, **fields):
    fields = {"sparsity": 0.9, "sequence_length": 16, "batch_size": 2, "steps": 10} | fields
    return Planner(CONFIGS[config], gpus=gpus, capacity=capacity, tflops=1.0).plan(ELSAModifier(**fields))


def test_lines_of_a_dense_run():
    plan = planned()
    assert plan.parameters == LINEARS + NORMS + 2 * EMBEDDING == 21664
    assert plan.pruned == LINEARS
    memory = plan.memory
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * 21664, 4 * 21664, 8 * 21664)
    assert memory.admm_state == LINEARS // 8
    # Matrices in bf16, norms in fp32.
    assert memory.teacher == 2 * (21664 - NORMS) + 4 * NORMS
    assert memory.gathered == 0
    lines = (memory.weights, memory.gradients, memory.optimizer, memory.teacher, memory.admm_state)
    assert memory.total == sum(lines) + memory.activations
    # A projection needs its scores and |v| beside all gradients.
    assert memory.activations >= 2 * 4 * LARGEST


def test_tied_embeddings_count_once():
    plan = planned("llama-tied")
    assert plan.parameters == LINEARS + NORMS + EMBEDDING
    assert plan.memory.weights == 4 * plan.parameters


@pytest.mark.parametrize(
    "state_dtype,penalty,entry,scales",
    [
        ("fp32", dict(dual=True), 4, 0),
        ("bf16", dict(form="coupled", value=0.1), 2, 0),
        ("int8", dict(dual=True), 1, 1),
        ("float8_e4m3fn", dict(form="coupled", value=0.1), 1, 2),
        ("int8", {}, 0, 0),
    ],
)
def test_admm_state(state_dtype, penalty, entry, scales):
    memory = planned(state_dtype=state_dtype, penalty=penalty).memory
    # Every weight is whole blocks of 256.
    assert memory.admm_state == entry * LINEARS + scales * 4 * LINEARS // 256 + LINEARS // 8


@pytest.mark.parametrize("name,entry,block", [("adam8bit", 1, 256), ("adam4bit", 0.5, 128), ("adamfp8", 1, 256)])
def test_moments_in_few_bits_only_where_torchao_has_them(name, entry, block):
    pytest.importorskip("torchao")
    # No tensor of this model has 4096 entries: all keep moments in the weights' dtype.
    assert planned(optimizer=name).memory.optimizer == 8 * 21664
    assert planned(optimizer=name, weight_dtype="bf16").memory.optimizer == 4 * 21664
    wide = type(CONFIGS["llama"])(**CONFIGS["llama"].to_dict() | {"vocab_size": 128, "tie_word_embeddings": False})
    plan = Planner(wide, gpus=1, capacity=0, tflops=1).plan(ELSAModifier(sparsity=0.5, optimizer=name))
    assert plan.memory.optimizer == 8 * (LINEARS + NORMS) + 2 * 2 * (entry + 4 / block) * 128 * 32


def test_moments_in_8_bits_everywhere():
    # Blocks of 32 in rows of 32; of 256 across the rows of 48 (the down projections); each norm is a part of one.
    down = 2 * 1536
    scales = (21664 - NORMS - down) // 32 + down // 256 + 5
    assert planned(optimizer="adam8bit_sr").memory.optimizer == 2 * (21664 + 4 * scales)


def test_weights_in_bf16_and_released_gradients():
    lean = planned(weight_dtype="bf16", optimizer="adam8bit_sr", gradient_release=True, max_grad_norm=None).memory
    assert (lean.weights, lean.gradients) == (2 * 21664, 2 * EMBEDDING)


def test_what_is_offloaded_has_room_for_two_weights():
    held = planned().memory
    plan = planned(offload_state=True)
    assert plan.offloaded == held.optimizer == 8 * 21664
    assert plan.memory.optimizer == 2 * 8 * EMBEDDING
    assert plan.memory.total == held.total - held.optimizer + plan.memory.optimizer
    # Of the layers' weights, the pair as well, which is more than the embedding's moments.
    penalty = {"form": "coupled", "value": 0.1}
    coupled = planned(offload_state=True, optimizer="adam8bit_sr", penalty=penalty)
    assert coupled.memory.optimizer == 2 * max(2 * (EMBEDDING + 4 * EMBEDDING // 32), (2 + 4) * LARGEST + 2 * 4 * 48)
    assert coupled.memory.admm_state == LINEARS // 8
    assert coupled.offloaded == planned(optimizer="adam8bit_sr").memory.optimizer + 4 * LINEARS
    with pytest.raises(ValueError, match="offload_state is for one GPU"):
        planned(gpus=2, offload_state=True)


def test_several_gpus_share_all():
    one, two = planned(batch_size=1), planned(gpus=2)
    for line in ("weights", "gradients", "optimizer", "admm_state"):
        assert getattr(two.memory, line) == getattr(one.memory, line) // 2
    # Three times a layer, and what is in no layer, in bf16; a layer's gradients in fp32.
    layer = LINEARS // 2 + 64
    assert two.memory.gathered == 2 * (3 * layer + 32 + 2 * EMBEDDING) + 4 * layer
    # Of the batch each has its part.
    assert two.sequences == one.sequences == planned(gpus=2, batch_size=1).sequences
    assert two.tokens == 2 * one.tokens == planned().tokens
    assert two.hours == one.hours
    assert planned(batch_size=4).memory.activations > planned(gpus=2, batch_size=3).memory.activations


def test_work():
    plan = planned(gradient_accumulation_steps=3)
    assert plan.tokens == 10 * 2 * 3 * 16
    # Forward and backward, and the teacher's forward.
    assert plan.flops == (6 + 2) * 21664 * plan.tokens
    assert planned(activation_checkpointing=True).flops == (8 + 2) * 21664 * 320
    assert planned(objective="next_token").flops == 6 * 21664 * 320
    assert planned(objective="next_token").memory.teacher == 0
    assert plan.hours == pytest.approx(plan.flops / 1e12 / 3600)


def test_a_sequence_is_no_longer_than_the_positions():
    assert planned(sequence_length=2048).tokens == 10 * 2 * 64


@pytest.mark.parametrize("share,release", [(0.7, False), (0.45, False), (0.6, True)])
def test_what_should_fit_fits_when_applied(share, release):
    fields = {"sparsity": 0.9, "sequence_length": 16, "batch_size": 4}
    fields |= {"gradient_release": True, "max_grad_norm": None} if release else {}
    modifier = ELSAModifier(**fields)
    capacity = round(share * Planner(CONFIGS["llama"], gpus=1, capacity=0, tflops=1).plan(modifier).memory.total)
    planner = Planner(CONFIGS["llama"], gpus=1, capacity=capacity, tflops=1)
    remedy = find_remedy(planner, modifier)
    assert remedy.plan.fits and remedy.together
    applied = planner.plan(ELSAModifier(**fields | remedy.together))
    assert applied.memory == remedy.plan.memory and applied.memory.total <= capacity
    assert applied.settings.steps * applied.settings.batch_size * applied.settings.gradient_accumulation_steps == (
        4 * 4096
    )
    for change in remedy.changes:
        alone = planner.plan(ELSAModifier(**fields | change.fields))
        assert planner.plan(modifier).memory.total - alone.memory.total == change.saves > 0


def test_where_nothing_suffices():
    planner = Planner(CONFIGS["llama"], gpus=1, capacity=1000, tflops=1)
    remedy = find_remedy(planner, ELSAModifier(sparsity=0.9, sequence_length=16))
    assert not remedy.plan.fits
    assert (
        remedy.plan.memory.total
        == planner.plan(ELSAModifier(**{"sparsity": 0.9, "sequence_length": 16} | remedy.together)).memory.total
    )


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "120"})
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    CONFIGS["llama"].save_pretrained(directory)
    return directory


def test_command_needs_a_configuration_alone(tiny):
    output = run(tiny, "--recipe", ROOT / "recipes/elsa_90.yaml").stdout
    assert "21,664 in fp32" in output and "Fits 1 GPU of 80.00 GB" in output
    output = run(tiny, "--recipe", ROOT / "recipes/elsa_90.yaml", "--gpu-memory", 0.0012, "--gpus", 2, code=1).stdout
    assert "Does not fit 2 GPUs" in output and "activation_checkpointing: true" in output and "torchrun" in output


def test_command_in_json(tiny):
    plan = json.loads(run(tiny, "--recipe", ROOT / "recipes/elsa_90.yaml", "--json").stdout)
    assert plan["fits"] and plan["memory"]["weights"] == 4 * 21664 and "together" not in plan
    plan = json.loads(
        run(tiny, "--recipe", ROOT / "recipes/elsa_90.yaml", "--json", "--gpu-memory", 0.0007, code=1).stdout
    )
    assert not plan["fits"] and plan["together"]["total"] < plan["memory"]["total"]


def test_errors_name_what_is_wrong(tiny, tmp_path):
    def error(text):
        (tmp_path / "recipe.yaml").write_text(text)
        return run(tiny, "--recipe", tmp_path / "recipe.yaml", code=2).stderr

    stage = "prune_stage:\n  prune_modifiers:\n    "
    assert "has no ELSAModifier" in error(stage + "QuantizationModifier:\n      targets: Linear\n")
    assert "state_dtype" in error(stage + "ELSAModifier:\n      sparsity: 0.9\n      state_dtype: int3\n")
    assert "mask_structure 5:7" in error(stage + "ELSAModifier:\n      mask_structure: '5:7'\n")
    assert "recipe.yaml" in error("][")
    assert "config.json" in run(tmp_path, "--recipe", ROOT / "recipes/elsa_90.yaml", code=2).stderr
    assert "none.yaml is not a file, and no recipe" in run(tiny, "--recipe", tmp_path / "none.yaml", code=2).stderr
    assert json.loads(run(tiny, "--recipe", "elsa_90", "--json").stdout)["fits"]


def test_the_worked_example():
    """docs/planning.md: Gemma-2-27B."""
    pytest.importorskip("torchao")
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(GEMMA)
    attention = 4608 * (32 + 16 + 16) * 128 + 32 * 128 * 4608
    linears = 46 * (attention + 3 * 4608 * 36864)
    parameters = linears + 46 * 4 * 4608 + 4608 + 256000 * 4608
    plan = Planner(config, gpus=2, capacity=141 * 10**9, tflops=400).plan(modifier_of_recipe(GEMMA / "recipe.yaml"))
    assert (plan.parameters, plan.pruned) == (parameters, linears)
    assert plan.fits
    page = (ROOT / "docs" / "planning.md").read_text()
    for line in ("weights", "gradients", "optimizer", "admm_state", "activations", "gathered", "total"):
        assert f"{getattr(plan.memory, line) / 1e9:.2f}" in page, line
    assert f"{parameters:,}" in page and f"{linears:,}" in page and f"{plan.flops:.3g}" in page


@pytest.mark.parametrize(
    "model,recipe,needed",
    [
        ("llama-2-7b", "elsa_90", {"activation_checkpointing": True, "offload_state": True}),
        ("llama-2-13b", "elsa_l_90", {"gradient_release": True, "max_grad_norm": None, "offload_state": True}),
    ],
)
def test_what_one_gpu_of_80_gb_holds(model, recipe, needed):
    """docs/planning.md."""
    configuration = Path(__file__).parent / "configs" / model
    found = json.loads(run(configuration, "--recipe", recipe, "--gpu-memory", 80, "--json", code=1).stdout)
    assert found["together"]["fits"] and found["together"]["fields"] == needed
    page = (ROOT / "docs" / "planning.md").read_text()
    assert f"| {found['memory']['total'] / 1e9:.2f} | {found['together']['total'] / 1e9:.2f} |" in page


def test_a_recipe_that_fits_where_logits_come_in_chunks():
    """Whole, the logits of a micro-batch, and the teacher's, would add more than 30 GB."""
    pytest.importorskip("torchao")
    output = run(GEMMA, "--recipe", ROOT / "recipes/elsa_l_90.yaml", "--gpus", 2, "--gpu-memory", 141, "--json")
    assert json.loads(output.stdout)["memory"]["total"] < 130e9
