"""``elsa prune`` as two processes under torchrun, on a tiny model: one of them speaks and saves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from elsa_modifier.pruning.command import run
from elsa_modifier.resuming.directory import complete_checkpoints
from elsa_modifier.resuming.manifest import Manifest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
prune_stage:
  prune_modifiers:
    ELSAModifier:
      {sparsity: 0.8, steps: 8, batch_size: 4, sequence_length: 16, interval: 3, lr: 1e-3, precision: fp32}
"""


@pytest.fixture
def torchrun(checkpoint, texts, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "data.txt").write_text(" ".join(texts["text"]))

    def torchrun(*more, data="data.txt"):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        command += ["-m", "elsa_cli", "prune", checkpoint(), "--recipe", tmp_path / "recipe.yaml"]
        command += ["--data", tmp_path / data, "--out", tmp_path / "out", *more]
        return subprocess.run(
            [str(part) for part in command], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600
        )

    return torchrun


def test_two_processes_make_one_model(torchrun, checkpoint, tmp_path):
    done = torchrun("--json")
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout)
    alone = run(str(checkpoint()), tmp_path / "recipe.yaml", str(tmp_path / "data.txt"), tmp_path / "alone")
    assert summary["processes"] == 2 and alone.processes == 1
    for field in ("sparsity", "perplexity_before", "perplexity_after", "held_out_tokens"):
        assert summary[field] == pytest.approx(getattr(alone, field), rel=1e-4), field
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("out", "alone"))
    for name in theirs:
        assert torch.equal(ours[name] == 0, theirs[name] == 0), name
        assert torch.allclose(ours[name], theirs[name], atol=1e-5), name
    # Written once, by the first; and training checkpoints by both, each its rows.
    lines = (tmp_path / "out-training" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))
    (last,) = complete_checkpoints(tmp_path / "out-training")
    assert set(Manifest.read(last).files) == {"rank-00000.safetensors", "rank-00001.safetensors"}
    # Said once.
    for said in ("Training text:", "pruned weights; zero before", "Going over", "0/8 [00:00<?, ?step/s]"):
        assert done.stderr.count(said) <= 1, said
    assert "pruned weights; zero before" in done.stderr


def test_what_cannot_work_ends_all_with_a_line(torchrun):
    done = torchrun(data="none.txt")
    assert done.returncode
    assert "error: data: there is no file" in done.stderr and not done.stdout
