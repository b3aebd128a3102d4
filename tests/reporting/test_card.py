"""The model card: metadata as the hub reads it, and never over somebody else's."""

import dataclasses
import json

import pytest
from huggingface_hub import ModelCard

from elsa_modifier import load_sparse
from elsa_modifier.pruning.summary import Summary
from elsa_modifier.reporting.card import build_card, write_card
from elsa_modifier.reporting.facts import gather
from elsa_sparse import save_sparse
from elsa_sparse.model_card import REPORT_MARK as MARK
from tests.cli.test_commands import run as command
from tests.reporting.conftest import EVALUATION


def facts_of(directory, **given):
    summary = dataclasses.replace(Summary.read(directory), **given)
    return dataclasses.replace(gather(directory, progress=False), summary=summary)


def test_metadata_of_the_hub(pruned_run):
    EVALUATION.write(pruned_run)
    given = {"base": "meta/llama-1", "base_on_hub": True, "data": "allenai/c4:en", "data_on_hub": True}
    card = ModelCard(build_card(facts_of(pruned_run, **given)))
    data = card.data
    assert (data.base_model, data.datasets) == ("meta/llama-1", ["allenai/c4"])
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert {"sparse", "elsa-modifier"} <= set(data.tags)
    assert data.metrics == ["accuracy", "perplexity"]
    results = [(r.dataset_name, r.metric_type, r.metric_value) for r in data.eval_results]
    assert results == [
        ("WikiText-2", "perplexity", 81.9),
        ("arc_easy", "accuracy", 0.41),
        ("winogrande", "accuracy", 0.5),
    ]
    [index] = data.to_dict()["model-index"]
    assert index["name"] and all(r["dataset"]["type"] and r["task"]["type"] for r in index["results"])
    assert (
        "| WikiText-2 | 20.40 | 81.90 |" in card.text
        and "| arc\\_easy | acc,none | 0.4100 ± 0.0100 | 200 |" in card.text
    )


def test_what_is_on_a_disk_has_no_name_on_the_hub(pruned_run):
    data = ModelCard(build_card(facts_of(pruned_run))).data
    assert data.base_model is None and data.datasets is None and data.eval_results is None
    text = build_card(facts_of(pruned_run))
    assert str(pruned_run.parent) not in text and "text.txt" in text
    assert ModelCard(build_card(facts_of(pruned_run), "a/b")).data.base_model == "a/b"
    for name in ("/a/b", "a/b/c", "../a"):
        with pytest.raises(ValueError, match="organization/name"):
            build_card(facts_of(pruned_run), name)


def test_it_replaces_its_own_and_no_other(pruned_run):
    """Its own: the short one of every sparse checkpoint, too."""
    assert MARK not in (pruned_run / "README.md").read_text()
    facts = gather(pruned_run, progress=False)
    assert write_card(facts) and MARK in (pruned_run / "README.md").read_text()
    assert write_card(facts)
    (pruned_run / "README.md").write_text((pruned_run / "README.md").read_text().replace(MARK, ""))
    assert not write_card(facts)


def test_the_checkpoint_stays_one(pruned_run, tmp_path):
    """With its card changed it is verified, loaded, packed again and replaced; what the card says stays behind."""
    write_card(gather(pruned_run, progress=False))
    command("inspect", pruned_run, "--verify")
    again = tmp_path / "again"
    save_sparse(pruned_run, again)
    assert MARK not in (again / "README.md").read_text()
    write_card(gather(again, progress=False))
    save_sparse(load_sparse(pruned_run), again, overwrite=True)
    assert not (again / "README.md").exists() and MARK in (pruned_run / "README.md").read_text()
    command("inspect", again, "--verify")


def test_names_are_text(pruned_run):
    EVALUATION.write(pruned_run)
    file = pruned_run / "elsa_eval.json"
    file.write_text(file.read_text().replace('"WikiText-2"', json.dumps("a|b\n---\n<b>: [x](y)")))
    card = ModelCard(build_card(facts_of(pruned_run)))
    assert len(card.data.eval_results) == 3 and "<b>" not in card.text.replace("\\<b", "")
