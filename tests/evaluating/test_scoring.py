"""Perplexity by transformers' recipe, and agreement by its definition."""

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from elsa_modifier import load_sparse
from elsa_modifier.evaluating import scoring
from elsa_modifier.evaluating.scoring import score
from elsa_modifier.evaluating.texts import read_evaluation_texts
from elsa_modifier.training import objective
from elsa_sparse import SparseLinear


def strided_perplexity(model, ids, *, length, stride):
    """As transformers' documentation computes it for models of a fixed length.

    :param ids: (1, tokens)
    """
    total, count, before = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + length, ids.shape[1])
        inputs = ids[:, begin:end]
        targets = inputs.clone()
        targets[:, : -(end - before)] = -100
        with torch.no_grad():
            loss = model(inputs, labels=targets).loss
        predicted = int((targets != -100).sum()) - 1
        total, count, before = total + float(loss) * predicted, count + predicted, end
        if end == ids.shape[1]:
            break
    return math.exp(total / count)


@pytest.mark.parametrize("name", ["llama", "opt", "qwen3-moe"])
@pytest.mark.parametrize("length", [64, 16])
def test_it_is_transformers_recipe_without_overlap(name, length, load, tokenizer, book):
    model = load(name).eval()
    [text] = read_evaluation_texts([str(book)], tokenizer, window=length)
    found = score(model, text.windows)
    ids = tokenizer(book.read_text(), return_tensors="pt").input_ids
    assert found.perplexity == pytest.approx(strided_perplexity(model, ids, length=length, stride=length), rel=1e-6)
    assert found.tokens == 640 // length * (length - 1)


@pytest.fixture
def two(load):
    """A model and a dense one that differs."""
    dense = load().eval()
    model = copy.deepcopy(dense)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model, dense


def test_agreement_is_what_it_is_by_definition(two, tokenizer, book):
    model, dense = two
    [text] = read_evaluation_texts([str(book)], tokenizer, window=64)
    found = score(model, text.windows, dense=dense)
    with torch.no_grad():
        q, p = (m(text.windows).logits[:, :-1].double().softmax(-1) for m in (model, dense))
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4) and found.kl > 1e-3
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean())) and 0 < found.top1 < 1
    for own, of in ((found.perplexity, q), (found.dense_perplexity, p)):
        chosen = of.gather(-1, text.windows[:, 1:, None])
        assert own == pytest.approx(float((-chosen.log().mean()).exp()), rel=1e-5)


def test_chunks_change_nothing(two, tokenizer, book, monkeypatch):
    model, dense = two
    [text] = read_evaluation_texts([str(book)], tokenizer, window=64)
    whole = score(model, text.windows, dense=dense)
    seen = []
    inner = scoring.token_rows
    monkeypatch.setattr(scoring, "token_rows", lambda m, b, size: seen.append(size) or inner(m, b, size))
    monkeypatch.setattr(scoring, "_ROWS", 7)
    monkeypatch.setattr(scoring, "_TOKENS", 128)
    monkeypatch.setattr(objective, "CHUNK_BYTES", 4 * 96 * 5)
    parts = score(model, text.windows, dense=dense)
    assert set(seen) == {5}
    for name in ("perplexity", "dense_perplexity", "kl", "top1", "tokens"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-5)


def test_a_model_agrees_with_itself(load, tokenizer, book):
    [text] = read_evaluation_texts([str(book)], tokenizer, window=64)
    same = score(load(), text.windows, dense=load())
    assert same.top1 == 1 and same.kl == pytest.approx(0, abs=1e-9) and same.perplexity == same.dense_perplexity


def test_another_vocabulary_is_refused(load, tokenizer, book):
    [text] = read_evaluation_texts([str(book)], tokenizer, window=64)
    config = load().config.to_dict() | {"vocab_size": 128}
    other = AutoModelForCausalLM.from_config(LlamaConfig(**config))
    with pytest.raises(ValueError, match="the dense model has 128 words and the model 96"):
        score(load(), text.windows, dense=other)


def test_a_compressed_model_is_judged_as_the_dense_one(outputs, tokenizer, book):
    pytest.importorskip("elsa_kernels")
    dense, _, sparse = outputs
    [text] = read_evaluation_texts([str(book)], tokenizer, window=64)
    base = AutoModelForCausalLM.from_pretrained(dense)
    models = [load_sparse(sparse, compressed=compressed) for compressed in (False, True)]
    assert any(isinstance(module, SparseLinear) for module in models[1].modules())
    plain, compressed = (score(model, text.windows, dense=base) for model in models)
    assert compressed.perplexity == pytest.approx(plain.perplexity, rel=1e-4)
    assert compressed.kl == pytest.approx(plain.kl, rel=1e-3) and plain.kl > 1e-5
