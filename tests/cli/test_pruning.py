"""``elsa prune`` on a tiny model, from files to the summary."""

import json

import pytest
import torch
from loguru import logger
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from elsa_cli.main import app
from elsa_modifier.evaluation import perplexity
from elsa_modifier.pruning.command import _measured
from elsa_modifier.resuming.checkpoints import TrainingCheckpoints
from tests.resuming.conftest import Killed

RECIPE = """
prune_stage:
  prune_modifiers:
    ELSAModifier: {sparsity: 0.8, steps: 12, batch_size: 2, sequence_length: 16, interval: 3, lr: 1e-3}
"""


@pytest.fixture
def command(checkpoint, texts, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "data").mkdir()
    rows = texts["text"]
    (tmp_path / "data" / "a.txt").write_text(" ".join(rows[:32]))
    (tmp_path / "data" / "b.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows[32:]))

    def command(*more, code=0, out="out", data="data"):
        arguments = ["prune", checkpoint(), "--recipe", tmp_path / "recipe.yaml", "--data", tmp_path / data]
        arguments += ["--out", tmp_path / out, *more]
        result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
        assert result.exit_code == code, result.output
        return result

    return command


def test_summary(command, tmp_path):
    summary = json.loads(command("--json").stdout)
    assert summary["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert summary["perplexity_before"] > 1 and summary["perplexity_after"] > 1
    assert summary["held_out_tokens"] % 16 == 0 and summary["memory"] > 10**8
    assert summary["seconds"] > summary["training_seconds"] > 0
    assert (summary["steps"], summary["tokens"]) == (12, 12 * 2 * 15)
    kept = [file for file in (tmp_path / "out-training").glob("step-*/*") if file.is_file()]
    assert summary["checkpoint_bytes"] == sum(file.stat().st_size for file in kept) > 10**5
    model = AutoModelForCausalLM.from_pretrained(summary["model"])
    assert float((model.model.layers[0].mlp.up_proj.weight == 0).float().mean()) > 0.5
    lines = (tmp_path / "out-training" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 13))
    for key in ("history", "checkpoints", "metrics"):
        assert str(tmp_path) in summary[key]


def test_the_same_command_goes_on(command, tmp_path, monkeypatch):
    whole = json.loads(command("--json", out="whole").stdout)
    inner = TrainingCheckpoints.after_step

    def after_step(self, step, catch_up):
        inner(self, step, catch_up)
        if step == 5:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TrainingCheckpoints, "after_step", after_step)
        command("--checkpoint-minutes", "1e-9")
    logged = []
    handler = logger.add(logged.append, level="INFO")
    said = command("--checkpoint-minutes", "1e-9")
    logger.remove(handler)
    assert "perplexity" in said.stdout and "80.0" in said.stdout and "out-training" in said.stdout
    assert "12 steps, 360 predicted tokens" in said.stdout and "MB, which are not needed any more" in said.stdout
    assert any("Going on after step 5" in message for message in logged)
    resumed, first = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("out", "whole"))
    assert all(torch.equal(resumed[name], first[name]) for name in first)
    again = json.loads(command("--json", "--resume", "never").stdout)
    assert again["perplexity_after"] == whole["perplexity_after"]


def test_a_model_in_bf16_is_measured_in_fp32_and_stays(load):
    """Not by its own arithmetic, which is slow on most CPUs."""
    model = load(dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(2, 66).view(4, 16)
    found = _measured(model, ids, "Perplexity")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(tensor.dtype == before[name].dtype for name, tensor in model.state_dict().items())
    assert found == perplexity(load(dtype=torch.bfloat16).float(), ids, precision="fp32")


def test_no_checkpoints(command, tmp_path):
    assert json.loads(command("--json", "--checkpoint-minutes", "0").stdout)["checkpoints"] is None
    assert not (tmp_path / "out-training").exists()


def test_errors_are_a_line(command, tmp_path):
    assert "there is no file" in command(code=1, data="none.txt").stderr
    (tmp_path / "few.txt").write_text("w1 w2 w3")
    assert "has 4 tokens; a run takes at least 32" in command(code=1, data="few.txt").stderr
    (tmp_path / "rows.jsonl").write_text('{"text": "w1"}\n{"other": 1}\n')
    assert "line 2, has neither text nor messages, but other" in command(code=1, data="rows.jsonl").stderr
    (tmp_path / "broken.jsonl").write_text("{")
    assert "line 1, is not JSON" in command(code=1, data="broken.jsonl").stderr
    (tmp_path / "empty").mkdir()
    assert "has no file that ends with" in command(code=1, data="empty").stderr
    assert "track has 'paper'" in command("--track", "paper", code=1).stderr
