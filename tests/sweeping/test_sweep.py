"""``elsa sweep`` on a tiny model: points, what is picked up, and what is refused before the first run."""

import json
import xml.etree.ElementTree

import pytest
from transformers import AutoModelForCausalLM

from elsa_modifier.evaluating.record import EVALUATION_FILE, Evaluation
from elsa_modifier.resuming.checkpoints import TrainingCheckpoints
from elsa_modifier.sweeping import command as sweep_command
from elsa_modifier.sweeping.checking import parse_sparsities
from elsa_modifier.sweeping.record import SWEEP_FILE, Sweep
from tests.cli.test_commands import run
from tests.resuming.conftest import Killed

# The teacher counts as much at every sparsity, so that a denser model is the nearer to it.
FIELDS = "sparsity: 0.9, steps: 6, batch_size: 2, sequence_length: 16, interval: 2, lr: 1e-3, objective: {weight: 1.0}"


@pytest.fixture
def command(checkpoint, texts, tmp_path):
    """Function that runs a sweep; what it has pruned so far, by sparsity, is its ``pruned``."""
    (tmp_path / "words.txt").write_text(" ".join(texts["text"]))

    def command(*sparsities, fields=FIELDS, code=0, more=(), out="out"):
        recipe = f"prune_stage:\n  prune_modifiers:\n    ELSAModifier: {{{fields}}}\n"
        (tmp_path / "recipe.yaml").write_text(recipe)
        arguments = [checkpoint(), "--sparsities", *sparsities, "--recipe", tmp_path / "recipe.yaml"]
        arguments += ["--data", tmp_path / "words.txt", "--out", tmp_path / out, *more]
        return run("sweep", *arguments, code=code)

    return command


@pytest.fixture
def pruned(monkeypatch):
    """Sparsities that were pruned to."""
    done = []
    inner = sweep_command.prune

    def prune(*args, sparsity, **kwargs):
        done.append(sparsity)
        return inner(*args, sparsity=sparsity, **kwargs)

    monkeypatch.setattr(sweep_command, "prune", prune)
    return done


def test_a_sweep_and_what_is_added_to_it(command, pruned, tmp_path):
    out = tmp_path / "out"
    shown = command(80, 50).stdout
    assert pruned == [0.5, 0.8] and "50%" in shown and "dense" in shown
    sweep = Sweep.read(out)
    assert [(p.sparsity, p.directory) for p in sweep.points] == [(0.5, "sparsity-50"), (0.8, "sparsity-80")]
    for point in sweep.points:
        weight = AutoModelForCausalLM.from_pretrained(out / point.directory).model.layers[0].mlp.up_proj.weight
        assert abs(float((weight == 0).float().mean()) - point.sparsity) < 0.25
        assert Evaluation.read(out / point.directory) == point.evaluation and point.evaluation.agreement[0].kl > 0
        assert not list((out / f"{point.directory}-training").glob("step-*"))
    assert sweep.points[0].evaluation.agreement[0].kl < sweep.points[1].evaluation.agreement[0].kl
    assert sweep.dense.perplexity[0].value == sweep.points[0].evaluation.perplexity[0].dense
    # Nothing is made twice.
    command("0.8", "70", "50%")
    assert pruned == [0.5, 0.8, 0.7] and [p.sparsity for p in Sweep.read(out).points] == [0.5, 0.7, 0.8]
    assert Sweep.read(out).points[0] == sweep.points[0]
    table = [line for line in (out / "sweep.md").read_text().splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in table] == ["| sparsity", "| dense", "| 50%", "| 70%", "| 80%"]
    value = sweep.points[1].evaluation.perplexity[0].value
    assert f"| {value:,.2f} |" in table[-1] and f"{value:,.2f}" in shown


def test_the_figure(command, tmp_path):
    pytest.importorskip("matplotlib")
    command(50)
    svg = xml.etree.ElementTree.parse(tmp_path / "out" / "sweep.svg").getroot()
    assert svg.tag.endswith("svg") and (tmp_path / "out" / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_that_was_killed_goes_on(command, pruned, tmp_path, monkeypatch):
    inner = TrainingCheckpoints.after_step

    def after_step(self, step, catch_up):
        inner(self, step, catch_up)
        if step == 3 and len(pruned) == 2:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TrainingCheckpoints, "after_step", after_step)
        command(50, 80, more=("--checkpoint-minutes", "1e-9"))
    assert len(Sweep.read(tmp_path / "out").points) == 1
    began = []
    patch_steps = TrainingCheckpoints.after_step
    monkeypatch.setattr(
        TrainingCheckpoints,
        "after_step",
        lambda self, step, *rest: began.append(step) or patch_steps(self, step, *rest),
    )
    command(50, 80, more=("--checkpoint-minutes", "1e-9"))
    assert pruned == [0.5, 0.8, 0.8] and began == [4, 5, 6] and len(Sweep.read(tmp_path / "out").points) == 2


def test_another_text_to_judge_on_makes_evaluations_anew_and_no_model(command, pruned, tmp_path):
    command(50)
    (tmp_path / "other.txt").write_text(" ".join(f"w{i % 94}" for i in range(300)))
    command(50, more=("--evaluate", tmp_path / "other.txt", "--windows", 2))
    [point] = Sweep.read(tmp_path / "out").points
    assert pruned == [0.5] and point.evaluation.perplexity[0].text == "other.txt"
    (tmp_path / "out" / "sparsity-50" / EVALUATION_FILE).write_text("broken")
    command(50, more=("--evaluate", tmp_path / "other.txt", "--windows", 2))
    assert Sweep.read(tmp_path / "out").points == (point,)


@pytest.mark.parametrize(
    "sparsities,fields,said",
    [
        (["50", "x"], FIELDS, "x is no number"),
        (["50", "100"], FIELDS, "100 is not one"),
        (["0"], FIELDS, "0 is not one"),
        (["1"], FIELDS, "1 is not one"),
        (["50", "99"], f"{FIELDS}, shared_budget: {{cap: 0.95}}", "99% will not do: shared_budget.floor and .cap"),
        (["50"], "mask_structure: '2:4', steps: 6", "whose sparsity is always the same"),
        (["50"], "sparsity: {'re:.*mlp.*': 0.5}, steps: 6", "for each of some patterns"),
        (["50"], f"{FIELDS}, targets: [Linea]", "match no module of the model"),
        (["50"], f"{FIELDS}, nonsense: 1", "nonsense"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_run(sparsities, fields, said, command, pruned, tmp_path):
    assert said in " ".join(command(*sparsities, fields=fields, code=1).stderr.split())
    assert pruned == [] and not (tmp_path / "out").exists()


def test_a_directory_of_another_sweep_is_refused(command, pruned, tmp_path):
    command(50)
    other = " ".join(command(50, fields=FIELDS.replace("lr: 1e-3", "lr: 2e-3"), code=1).stderr.split())
    assert "holds another sweep (lr: 0.001 there, 0.002 here)" in other
    (tmp_path / "words.txt").write_text("w1 " + (tmp_path / "words.txt").read_text())
    assert "data: " in command(50, code=1).stderr
    document = json.loads((tmp_path / "out" / SWEEP_FILE).read_text())
    (tmp_path / "out" / SWEEP_FILE).write_text(json.dumps(document | {"format": 2}))
    assert "format" in command(50, code=1).stderr and pruned == [0.5]


def test_sparsities():
    assert parse_sparsities(["90", "50%", "0.7", "97.5", "0.5", "0.5%"]) == [0.005, 0.5, 0.7, 0.9, 0.975]
