"""Text that a tiny model can be judged on, and a task for lm-eval that reads a local file."""

import json
from pathlib import Path

import pytest
import torch

from elsa_modifier import save_sparse
from tests.sparse.conftest import edit_config, pruned, sparse

__all__ = ["edit_config", "pruned", "sparse"]

TASK = """
task: next_word
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {file}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


@pytest.fixture
def book(tmp_path):
    """A file of 640 tokens of the tests' tokenizer."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(94, (640,), generator=generator).tolist()
    file = tmp_path / "book.txt"
    file.write_text(" ".join(f"w{word}" for word in words))
    return file


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A directory with lm-eval's task ``next_word``: 24 questions of two choices."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    directory = tmp_path / "tasks"
    directory.mkdir()
    rows = [
        {"question": f"w{i} w{i + 7}", "choices": [f"w{i + 14}", f"w{i + 3} w{i + 4}"], "label": i % 2}
        for i in range(24)
    ]
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (directory / "next_word.yaml").write_text(TASK.format(file=directory / "rows.jsonl"))
    return directory


@pytest.fixture
def outputs(checkpoint, tokenizer, tmp_path):
    """Directories of a model, and of the same pruned by magnitude, as elsa writes them: dense, and sparse."""
    from transformers import AutoModelForCausalLM

    directory = tmp_path / "made" / "dense"
    model = AutoModelForCausalLM.from_pretrained(checkpoint())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.ndim == 2:
                parameter[parameter.abs() < parameter.abs().flatten().quantile(0.8)] = 0
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "elsa_history.json").write_text(json.dumps({"model": str(checkpoint()), "steps": []}))
    save_sparse(directory, tmp_path / "made" / "sparse", progress=False)
    return Path(checkpoint()), directory, tmp_path / "made" / "sparse"
