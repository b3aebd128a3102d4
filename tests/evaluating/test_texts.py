"""Texts by the published protocol, from a hub that is made here, and one's own."""

import json
from types import SimpleNamespace

import pytest
from datasets import Dataset

from elsa_modifier.evaluating import texts as texts_module
from elsa_modifier.evaluating.texts import read_evaluation_texts


@pytest.fixture
def hub(monkeypatch):
    """What has been asked for; three lines of WikiText-2, and 1,200 documents of C4 of 20 words each."""
    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        if names[0] == "Salesforce/wikitext":
            return {"text": ["w1 w2", "", "w3"] + ["w4"] * 30}
        rows = Dataset.from_dict({"text": [" ".join([f"w{i % 94}"] * 20) for i in range(1200)]})
        return SimpleNamespace(take=lambda count: rows.select(range(count)))

    monkeypatch.setattr(texts_module, "load_dataset", load_dataset)
    return asked


def test_published_texts(hub, tokenizer):
    wiki, c4 = read_evaluation_texts(["wikitext2", "c4"], tokenizer, window=16)
    assert (wiki.name, c4.name) == ("WikiText-2", "C4")
    joined = "\n\n".join(["w1 w2", "", "w3"] + ["w4"] * 30)
    assert wiki.windows.tolist() == [tokenizer(joined)["input_ids"][:16], tokenizer(joined)["input_ids"][16:32]]
    # 1,100 documents have 22,000 words; 256 windows are measured.
    assert c4.windows.shape == (256, 16) and c4.windows.flatten()[20:22].tolist() == tokenizer("w1 w1")["input_ids"]
    assert hub[0] == (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"})
    assert hub[1][1]["data_files"] == {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    assert [len(t.windows) for t in read_evaluation_texts(["wikitext2", "c4"], tokenizer, window=16, most=2)] == [2, 2]
    [whole] = read_evaluation_texts(["c4"], tokenizer, window=16, most=1000)
    assert len(whole.windows) == 256


def test_ones_own_text(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("w1 w2 w3")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ("w4 w5", "w6 w7")))
    [both] = read_evaluation_texts([str(tmp_path), str(tmp_path)], tokenizer, window=3)
    assert both.name == tmp_path.name
    assert tokenizer.batch_decode(both.windows) == ["w1 w2 w3", "w4 w5 w6"]
    [short] = read_evaluation_texts([str(tmp_path / "a.txt")], tokenizer, window=64)
    assert short.windows.shape == (1, 3)
    (tmp_path / "c.txt").write_text("w1")
    with pytest.raises(ValueError, match="has 1 tokens; perplexity takes at least two"):
        read_evaluation_texts([str(tmp_path / "c.txt")], tokenizer)


def test_without_a_hub_the_message_says_what_to_do(tokenizer, monkeypatch):
    def load_dataset(*names, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(texts_module, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"WikiText-2 cannot be read from the hub .*no network.*--data texts\.txt"):
        read_evaluation_texts(["wikitext2"], tokenizer)
