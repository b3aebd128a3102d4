"""Datasets of messages in the real ``oneshot``."""

import copy

import pytest
from datasets import Dataset
from llmcompressor import oneshot
from tokenizers.processors import TemplateProcessing

from elsa_modifier import ELSAModifier
from elsa_modifier.training import data

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {{ eos_token }} {% endfor %}"
ROWS = [[{"role": "w1", "content": f"w{i} w3"}, {"role": "w2", "content": "w4"}] for i in range(5, 13)]


@pytest.fixture
def chatting(tokenizer):
    """One that puts its first token, w0, before every text."""
    chatting = copy.deepcopy(tokenizer)
    chatting.bos_token = "w0"
    chatting.backend_tokenizer.post_processor = TemplateProcessing(
        single="w0 $A", special_tokens=[("w0", chatting.convert_tokens_to_ids("w0"))]
    )
    chatting.chat_template = TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }} ")
    return chatting


def packed(monkeypatch, model, tokenizer, dataset):
    """What is trained on, as text."""
    seen = []
    monkeypatch.setattr(
        "elsa_modifier.training.run.batches_from_calibration",
        lambda loader, **options: seen.append(loader.dataset) or data.batches_from_calibration(loader, **options),
    )
    modifier = ELSAModifier(sparsity=0.5, steps=1, batch_size=1, sequence_length=8, lr=1e-3)
    oneshot(model=model, processor=tokenizer, dataset=dataset, recipe=[modifier])
    return [tokenizer.decode(row) for row in seen[0]["input_ids"]]


def test_the_chat_template_is_applied_and_its_first_token_not_doubled(load, chatting, monkeypatch):
    texts = packed(monkeypatch, load(), chatting, Dataset.from_dict({"messages": ROWS, "id": list(range(8))}))
    assert texts == [f"w0 w1 w{i} w3 <eos> w2 w4 <eos>" for i in range(5, 13)]


def test_a_column_of_text_is_preferred(load, chatting, monkeypatch):
    texts = packed(monkeypatch, load(), chatting, Dataset.from_dict({"messages": ROWS, "text": ["w7 w8"] * 8}))
    assert texts == ["w0 w7 w8"] * 8


def test_a_tokenizer_without_a_template_is_refused(load, tokenizer):
    with pytest.raises(ValueError, match=r"columns \['messages'\], and the tokenizer no chat template"):
        oneshot(
            model=load(),
            processor=copy.deepcopy(tokenizer),
            dataset=Dataset.from_dict({"messages": ROWS}),
            recipe=[ELSAModifier(sparsity=0.5, steps=1)],
        )
