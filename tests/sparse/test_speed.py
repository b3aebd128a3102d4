"""What a comparison of speeds measures, and that it leaves things as they were. Times themselves are not tested."""

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from elsa_sparse import load_sparse, speed
from elsa_sparse.speed import Speed, compare_speed, weight_bytes

pytest.importorskip("elsa_kernels")

QUICK = {"batches": (1, 3), "prompt": 4, "tokens": 2, "rounds": 2, "progress": False}


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by what the models' calls take: a second, or two if the model is dense."""
    state = {"now": 0.0, "calls": []}

    def called(model, args, kwargs, output):
        name = "dense" if not getattr(model, "is_quantized", False) else "compressed"
        ids = args[0]
        state["calls"].append((name, *ids.shape))
        state["now"] += 2.0 if name == "dense" else 1.0

    original = speed._load

    def load(*args, **kwargs):
        model = original(*args, **kwargs)
        model.register_forward_hook(called, with_kwargs=True)
        return model

    monkeypatch.setattr(speed, "_load", load)
    monkeypatch.setattr("elsa_sparse.speed.time.perf_counter", lambda: state["now"])
    return state


def test_tokens_a_second(clock, sparse):
    measured = compare_speed(sparse(), **QUICK)
    assert [(s.what, s.batch) for s in measured.speeds] == [("prefill", 1), ("decode", 1), ("decode", 3)]
    assert [(s.dense, s.compressed) for s in measured.speeds] == [(2.0, 4.0), (0.5, 1.0), (1.5, 3.0)]
    assert all(s.ratio == s.slowest == s.fastest == 2 for s in measured.speeds)
    # In turns, after both have seen the prompts.
    turn = [("dense", 1, 4), ("compressed", 1, 4)]
    for batch in (1, 3):
        turn += [("dense", batch, 1)] * 2 + [("compressed", batch, 1)] * 2
    assert clock["calls"][-3 * len(turn) :] == 3 * turn


def test_sizes_layers_and_differences(sparse):
    directory = sparse()
    before = torch.get_num_threads()
    measured = compare_speed(directory, threads=1, **QUICK)
    dense, compressed = load_sparse(directory), load_sparse(directory, compressed=True)
    assert (measured.dense_bytes, measured.compressed_bytes) == (weight_bytes(dense), weight_bytes(compressed))
    assert measured.layers == (15, 15) and measured.dtype == "bfloat16" and measured.threads == 1
    assert 0 <= measured.logit_difference < 0.05 * measured.logit_range
    assert torch.get_num_threads() == before


def test_a_tied_weight_counts_once(pruned):
    tied = AutoModelForCausalLM.from_pretrained(pruned("llama-tied"))
    buffers = sum(buffer.nbytes for buffer in tied.buffers())
    assert weight_bytes(tied) == buffers + sum(parameter.nbytes for parameter in tied.parameters())
    untied = AutoModelForCausalLM.from_pretrained(pruned("llama"))
    assert weight_bytes(untied) - weight_bytes(tied) == 2 * 96 * 32


def test_dense_directories_and_an_int8_head(pruned):
    exact = compare_speed(pruned("llama-tied"), **QUICK)
    rounded = compare_speed(pruned("llama-tied"), int8_head=True, **QUICK)
    assert rounded.compressed_bytes < exact.compressed_bytes < exact.dense_bytes == rounded.dense_bytes
    assert rounded.logit_difference > exact.logit_difference


def test_ratio():
    assert Speed(what="decode", batch=1, dense=2.0, compressed=5.0, slowest=1.0, fastest=3.0).ratio == 2.5


@pytest.mark.parametrize(
    "fields,said",
    [
        ({"rounds": 0}, "rounds is 0; it has to be at least 1"),
        ({"threads": -1}, "threads is -1"),
        ({"batches": ()}, "batches are \\[\\]"),
        ({"batches": (4, 0)}, "batches are \\[4, 0\\]"),
        ({"prompt": 60}, "sequences would grow to 66 tokens.*this model takes 64"),
    ],
)
def test_numbers_that_cannot_be(fields, said, sparse):
    with pytest.raises(ValueError, match=said):
        compare_speed(sparse(), **(QUICK | fields))


def test_without_the_kernels(sparse, monkeypatch):
    monkeypatch.setitem(sys.modules, "elsa_kernels", None)
    with pytest.raises(ImportError, match="elsa-kernels"):
        compare_speed(sparse(), **QUICK)
