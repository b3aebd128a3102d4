"""A tiny model, pruned by `elsa prune`, as every report is about."""

import shutil

import pytest

from elsa_modifier.evaluating.record import Agreement, Evaluation, Perplexity, TaskResult
from elsa_modifier.pruning.command import run

RECIPE = """
prune_stage:
  prune_modifiers:
    ELSAModifier:
      {sparsity: %s, steps: 12, batch_size: 2, sequence_length: 16, interval: 3, lr: 1e-3, checkpoint: coded}
"""


@pytest.fixture(scope="session")
def runs(checkpoint, texts, tmp_path_factory):
    """Directories of two runs, at 80% and 50%."""
    place = tmp_path_factory.mktemp("runs")
    (place / "text.txt").write_text(" ".join(texts["text"]))
    for sparsity in (0.8, 0.5):
        recipe = place / f"{sparsity}.yaml"
        recipe.write_text(RECIPE % sparsity)
        run(str(checkpoint()), recipe, str(place / "text.txt"), place / f"out-{sparsity}", checkpoint_minutes=0)
    return place


@pytest.fixture
def pruned_run(runs, tmp_path):
    """A copy of the run at 80%, and of the one at 50% beside it."""
    for sparsity in (0.8, 0.5):
        shutil.copytree(runs / f"out-{sparsity}", tmp_path / f"out-{sparsity}")
    return tmp_path / "out-0.8"


EVALUATION = Evaluation(
    model="out",
    dense="dense",
    dtype="float32",
    perplexity=(Perplexity(text="WikiText-2", tokens=2046, window=1024, value=81.9, dense=20.4),),
    agreement=(Agreement(text="WikiText-2", top1=0.543, kl=1.25),),
    tasks=(
        TaskResult(task="arc_easy", metric="acc,none", value=0.41, stderr=0.01, fewshot=0, samples=200, limit=200),
        TaskResult(task="winogrande", metric="acc,none", value=0.5, stderr=0.014, fewshot=0, samples=1267),
    ),
)
BENCH = {
    "backend": "avx2",
    "threads": 1,
    "dtype": "float32",
    "rounds": 2,
    "speeds": [
        {
            "what": "prefill",
            "batch": 1,
            "dense": 700.0,
            "compressed": 350.0,
            "ratio": 0.5,
            "slowest": 0.4,
            "fastest": 0.6,
        },
        {"what": "decode", "batch": 1, "dense": 40.0, "compressed": 80.0, "ratio": 2.0, "slowest": 1.9, "fastest": 2.2},
    ],
}
