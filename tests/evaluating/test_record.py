"""``elsa_eval.json``: what is written is read, and nothing else."""

import json
import os
import re
from pathlib import Path

import pytest

from elsa_modifier.evaluating.record import EVALUATION_FILE, Agreement, Evaluation, Perplexity, TaskResult

WHOLE = Evaluation(
    model="out",
    dense="base",
    dtype="float32",
    perplexity=(Perplexity(text="WikiText-2", tokens=2047, window=2048, value=12.5, dense=11.0),),
    agreement=(Agreement(text="WikiText-2", top1=0.75, kl=0.1),),
    tasks=(TaskResult(task="boolq", metric="acc", value=0.5, stderr=0.01, limit=100, samples=100, fewshot=0),),
    made={"elsa_modifier": "0.1.0", "lm_eval": None},
)


def test_what_is_written_is_read(tmp_path):
    for evaluation in (WHOLE, Evaluation(model="out")):
        evaluation.write(tmp_path)
        assert Evaluation.read(tmp_path) == Evaluation.read(tmp_path / EVALUATION_FILE) == evaluation
    assert os.listdir(tmp_path) == [EVALUATION_FILE]


def test_the_documented_file(tmp_path):
    WHOLE.write(tmp_path)
    document = json.loads((tmp_path / EVALUATION_FILE).read_text())
    assert document["format"] == 1
    assert document["perplexity"][0] == {
        "text": "WikiText-2",
        "tokens": 2047,
        "window": 2048,
        "value": 12.5,
        "dense": 11.0,
    }
    assert document["agreement"] == [{"text": "WikiText-2", "top1": 0.75, "kl": 0.1}]
    assert set(document) == {"format", "model", "dense", "engine", "dtype", "perplexity", "agreement", "tasks", "made"}


@pytest.mark.parametrize(
    "change,said",
    [
        ({"format": 2}, "format is 2"),
        ({"perplexity": [{"text": "a", "tokens": 1, "window": 2, "value": -1.0}]}, r"perplexity\.0\.value is -1"),
        ({"agreement": [{"text": "a", "top1": 1.5, "kl": 0.0}]}, r"agreement\.0\.top1 is 1\.5"),
        ({"tasks": [{"task": "a", "metric": "acc", "value": "0.5"}]}, r"tasks\.0\.value is 0\.5"),
        ({"more": 1}, "more is 1"),
        ({"model": None}, "model is None"),
    ],
)
def test_anything_else_is_refused_by_its_field(change, said, tmp_path):
    WHOLE.write(tmp_path)
    file = tmp_path / EVALUATION_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=said):
        Evaluation.read(tmp_path)


def test_a_broken_file_is_refused(tmp_path):
    (tmp_path / EVALUATION_FILE).write_text("{")
    with pytest.raises(ValueError, match=r"elsa_eval\.json: the file"):
        Evaluation.read(tmp_path)
    (tmp_path / EVALUATION_FILE).write_text('{"model": "a", "made": {"x": NaN}}')
    with pytest.raises(ValueError, match=r"made\.x"):
        Evaluation.read(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    WHOLE.write(tmp_path)

    def no_space(handle):
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="no space"):
        Evaluation(model="new").write(tmp_path)
    assert Evaluation.read(tmp_path) == WHOLE and os.listdir(tmp_path) == [EVALUATION_FILE]


def test_the_file_in_the_documentation_is_one(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    [block] = re.findall(r"^```json\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (tmp_path / EVALUATION_FILE).write_text(block)
    found = Evaluation.read(tmp_path)
    assert json.loads(found.as_json()) == json.loads(block)
