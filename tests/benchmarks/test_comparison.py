import dataclasses

import pytest
import torch

from benchmarks import compare_methods, comparison_page
from benchmarks.compare_methods import Comparison
from benchmarks.comparison_page import best_rows
from benchmarks.methods import METHODS, Setting
from benchmarks.models import MODELS, SMOLLM2

BEST = SMOLLM2.learning_rates(0.8)[1]


@pytest.fixture
def measured(monkeypatch):
    """Every measurement that was made; a method's perplexity is lowest at the middle rate, and rises with the seed."""
    rows, calls = [], []

    def measure(on, held_out, modifier, *, magnitude, seed):
        lr = getattr(modifier, "lr", None) or BEST
        calls.append((type(modifier).__name__, lr, seed))
        return {"minutes": 1.0, "zeros": 0.8, "C4": 10 + 1e4 * abs(lr - BEST) + seed, "Wikipedia": 5.0}

    monkeypatch.setattr(compare_methods, "measure", measure)
    monkeypatch.setattr(compare_methods, "append_row", lambda name, row: rows.append(row))
    monkeypatch.setattr(compare_methods, "read_rows", lambda name: list(rows))
    monkeypatch.setattr(compare_methods, "write_page", lambda rows: None)
    return calls


MODEL = dataclasses.replace(SMOLLM2, held_out=lambda: {t: torch.zeros(1, 4) for t in ("C4", "Wikipedia")})


def test_a_tuned_method_is_run_with_three_rates_and_other_seeds_with_the_best(measured):
    Comparison(MODEL).run("gradual Fisher", 0.8, lrs=None, seeds=[0, 1, 2])
    low, centre, high = MODEL.learning_rates(0.8)
    assert (centre / low, high / centre) == pytest.approx((2, 2), rel=0.05)
    name = "GradualPruningModifier"
    assert measured == [(name, low, 0), (name, centre, 0), (name, high, 0), (name, centre, 1), (name, centre, 2)]


def test_what_is_there_is_not_measured_again_unless_asked(measured):
    for again, times in ((False, 2), (False, 2), (True, 4)):
        comparison = Comparison(MODEL, again=again)
        comparison.dense()
        comparison.run("Wanda", 0.8, lrs=None, seeds=[0, 1])
        assert len(measured) == times


def test_a_longer_run_is_another_measurement(measured):
    for steps in (MODEL.steps, 2 * MODEL.steps, 2 * MODEL.steps):
        Comparison(dataclasses.replace(MODEL, steps=steps)).run("ELSA", 0.8, lrs=None, seeds=[0])
    assert [name for name, _, _ in measured] == ["ELSAModifier"] * 2


def test_a_method_without_structures_is_left_out_of_them(measured):
    comparison = Comparison(MODEL)
    comparison.run("gradual Fisher", "2:4", lrs=None, seeds=[0])
    assert measured == []
    comparison.run("SparseGPT", "2:4", lrs=None, seeds=[0])
    assert [name for name, _, _ in measured] == ["SparseGPTModifier"]


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
@pytest.mark.parametrize("sparsity", [0.5, 0.8, "2:4"])
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"magnitude"}))
def test_every_method_makes_a_modifier_of_the_asked_for_sparsity_and_budget(name, sparsity, model):
    method = METHODS[name]
    if isinstance(sparsity, str) and not method.structured:
        pytest.skip("cannot do a structure")
    lr = 1e-3 if method.tuned else None
    made = method.make(Setting(model, sparsity, lr, 7))
    pruning, trained = (made[0], made[-1]) if isinstance(made, list) else (made, made)
    if isinstance(sparsity, str):
        assert pruning.mask_structure == "2:4"
    else:
        assert pruning.sparsity == sparsity
    if method.tuned:
        assert trained.lr == lr
    if method.seeded:
        assert (trained.seed, trained.steps) == (7, model.steps)
    else:
        assert trained.requires_calibration_data


def _row(lr, seed, perplexity):
    return {"model": "smollm2", "method": "gradual Fisher", "sparsity": 0.8, "lr": lr, "seed": seed, "minutes": 1.0} | {
        "zeros": 0.8,
        "C4": perplexity,
    }


def test_the_best_rate_is_that_of_the_first_seed_and_the_last_row_counts():
    rows = [_row(1e-3, 0, 50.0), _row(2e-3, 0, 40.0), _row(2e-3, 1, 60.0), _row(1e-3, 0, 45.0)]
    assert best_rows(rows) == [rows[1], rows[2]]


def test_runs_of_other_lengths_have_a_table_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setattr(comparison_page, "ROOT", tmp_path)
    (tmp_path / "docs" / "results").mkdir(parents=True)
    pages = {}
    monkeypatch.setattr(comparison_page, "publish", lambda name, lines: pages.update({name: "\n".join(lines)}))
    dense = _row(None, 0, 20.0) | {"method": "dense", "sparsity": 0.0}
    comparison_page.write_page([dense, _row(1e-3, 0, 50.0), _row(1e-3, 0, 30.0) | {"steps": 256}])
    page = pages["compare_methods"]
    assert "| method | 80% |\n|---|---|\n| gradual Fisher | 50.0 (1.0) |" in page
    assert "| method | 65,536 | 262,144 |\n|---|---|---|\n| gradual Fisher | 50.0 (1.0) | 30.0 (1.0) |" in page


def test_the_page_says_when_the_best_rate_is_the_last_that_was_tried(monkeypatch, tmp_path):
    monkeypatch.setattr(comparison_page, "ROOT", tmp_path)
    (tmp_path / "docs" / "results").mkdir(parents=True)
    pages = {}
    monkeypatch.setattr(comparison_page, "publish", lambda name, lines: pages.update({name: "\n".join(lines)}))
    dense = _row(None, 0, 20.0) | {"method": "dense", "sparsity": 0.0}
    comparison_page.write_page([dense, _row(1e-3, 0, 50.0), _row(2e-3, 0, 40.0), _row(2e-3, 1, 44.0)])
    page = pages["compare_methods"]
    assert "| gradual Fisher | 42.0 ± 2.0 (1.0) > |" in page
    assert "| gradual Fisher | 80% | 0.001: 50.0; 0.002: 40.0 |" in page
    assert (tmp_path / "docs" / "results" / "compare_methods.svg").stat().st_size > 1000
