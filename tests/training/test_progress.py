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
