"""What the progress bar says is what the history holds."""

import pytest

from elsa_modifier.training import loop
from tests.training.test_loop import run


class Bar:
    def __init__(self, total, **options):
        self.total, self.said, self.done = total, [], 0

    def __enter__(self):
        BARS.append(self)
        return self

    def __exit__(self, *exception):
        return False

    def set_postfix_str(self, text):
        self.said.append(text)

    def update(self):
        self.done += 1


BARS = []


def test_the_bar_says_what_the_history_holds(load, monkeypatch):
    monkeypatch.setattr(loop, "tqdm", Bar)
    BARS.clear()
    history = run(load())
    (bar,) = BARS
    assert bar.done == bar.total == len(history) == len(bar.said)
    shown, tokens, seconds = "", 0, 0.0
    for record, said in zip(history, bar.said, strict=True):
        tokens += record.tokens
        if record.residual is not None:
            shown = f" residual {record.residual:.3f}"
        expected = f"loss {record.loss:.3f}{shown} penalty {record.penalty:.2g} sparsity {record.sparsity:.3f} "
        words, rate = said.removesuffix(" tok/s").rsplit(" ", 1)
        assert words + " " == expected
        assert float(rate.replace(",", "")) == pytest.approx(tokens / record.seconds, rel=0.1)
        assert record.seconds > seconds
        seconds = record.seconds
    assert all(record.residual is None or 0 < record.residual < 2 for record in history)


def test_accumulated_losses_are_those_of_the_whole_batch(load):
    whole, parts = run(load(), batch_size=4), run(load(), batch_size=1, accumulation=4)
    for a, b in zip(whole, parts, strict=True):
        assert (a.loss, a.grad_norm) == (pytest.approx(b.loss, rel=1e-4), pytest.approx(b.grad_norm, rel=1e-2))
        assert (a.tokens, a.sparsity, a.penalty, a.learning_rate) == (b.tokens, b.sparsity, b.penalty, b.learning_rate)


def test_a_record_leaves_out_what_it_has_no_value_for():
    fields = dict(
        step=1,
        loss=2.0,
        learning_rate=1e-3,
        penalty=0.0,
        grad_norm=1.0,
        tokens=10,
        seconds=0.5,
        sparsity=0.0,
    )
    assert loop.StepRecord(**fields).as_dict() == fields
    full = fields | {"residual": 0.0, "mask_entered": 0}
    assert loop.StepRecord(**full).as_dict() == full
