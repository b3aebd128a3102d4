"""From files to windows of tokens, and from the cache the second time."""

import json

import pytest
import torch
from loguru import logger

from elsa_modifier import load_texts
from elsa_modifier.texts import documents as documents_module
from elsa_modifier.texts import windows as windows_module
from elsa_modifier.texts.cache import key_of
from elsa_modifier.texts.documents import documents
from elsa_modifier.texts.token_file import read_windows, write_windows
from elsa_modifier.texts.windows import read_texts, windows_of
from tests.conftest import make_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


@pytest.fixture
def book(tmp_path):
    """A file of 60 windows of 16 words that say which one they are."""
    file = tmp_path / "texts" / "book.txt"
    file.parent.mkdir()
    file.write_text(" ".join(f"w{i % 94}" for i in range(16 * 60)))
    return file


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ELSA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def tokenized(monkeypatch):
    """Texts that have been given to the tokenizer so far."""
    given = []
    inner = windows_module.text_of
    monkeypatch.setattr(windows_module, "text_of", lambda document, tok: given.append(document) or inner(document, tok))
    return given


def test_what_is_held_out_is_not_trained_on(book, tokenizer):
    texts = read_texts(str(book), tokenizer, length=16, tokens=10**6)
    assert len(texts.training) == 57 and texts.held_out.shape == (3, 16)
    ids = [i for row in texts.training["input_ids"] for i in row] + texts.held_out.flatten().tolist()
    assert ids == tokenizer(book.read_text())["input_ids"]
    # No more is read than the run uses, and what is measured on.
    short = read_texts(str(book), tokenizer, length=16, tokens=16 * 10)
    assert len(short.training) + len(short.held_out) == 42


def test_documents(tmp_path):
    (tmp_path / "b.md").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n\n{"messages": [{"role": "user", "content": "x"}]}\n')
    (tmp_path / "c.bin").write_bytes(b"\xff")
    assert list(documents(str(tmp_path))) == ["first", [{"role": "user", "content": "x"}], "second"]
    (tmp_path / "d.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"d\.txt is not text in UTF-8 .*byte 3"):
        list(documents(str(tmp_path)))


def test_a_long_file_is_read_in_parts_that_end_with_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "_PART", 10)
    lines = [f"line {i}\n" for i in range(9)]
    (tmp_path / "long.txt").write_text("".join(lines))
    parts = list(documents(str(tmp_path / "long.txt")))
    assert "".join(parts) == "".join(lines) and len(parts) > 3
    assert all(part.endswith("\n") and len(part) < 20 for part in parts)


def test_documents_end_with_the_separator_and_batches_change_nothing(tmp_path, tokenizer, monkeypatch):
    rows = [f"w{i} w{i + 1} w{i + 2}" for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    expected = [i for row in rows for i in [*tokenizer(row)["input_ids"], tokenizer.eos_token_id]]
    for batch in (1, 25, 2**20):
        monkeypatch.setattr(windows_module, "_BATCH", batch)
        assert windows_of(str(tmp_path / "rows.jsonl"), tokenizer, length=8).flatten().tolist() == expected


def test_messages_go_through_the_template(tmp_path):
    tokenizer = make_tokenizer()
    messages = [{"role": "w1", "content": "w2 w3"}, {"role": "w4", "content": "w5"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}))
    with pytest.raises(ValueError, match="no chat template"):
        windows_of(str(tmp_path / "chat.jsonl"), tokenizer, length=6)
    tokenizer.chat_template = TEMPLATE
    [window] = windows_of(str(tmp_path / "chat.jsonl"), tokenizer, length=6)
    assert tokenizer.decode(window) == "w1 w2 w3 w4 w5 <eos>"


def test_the_second_time_nothing_is_tokenized(book, tokenizer, cache, tokenized):
    said = []
    handler = logger.add(lambda message: said.append(message.record["message"]), level="INFO")
    first = windows_of(str(book), tokenizer, length=16)
    assert len(tokenized) == 1
    again = windows_of(str(book.parent), tokenizer, length=16, most=7)
    logger.remove(handler)
    assert len(tokenized) == 1 and torch.equal(again, first[:7])
    assert "961 tokens in 1 document; 60 windows of 16, kept in" in said[0] and ", from " in said[1]
    [file] = cache.iterdir()
    assert read_windows(file, length=16)[1] == {"documents": "1", "tokens": "961", "complete": "true"}


def test_what_was_cut_short_is_made_anew_when_more_is_wanted(book, tokenizer, cache, tokenized):
    short = windows_of(str(book), tokenizer, length=16, most=5)
    assert len(short) == 5 and len(tokenized) == 1
    whole = windows_of(str(book), tokenizer, length=16)
    assert len(whole) == 60 and len(tokenized) == 2 and torch.equal(whole[:5], short)
    assert len(list(cache.iterdir())) == 1


def test_the_key_is_of_content_tokenizer_and_length(book, tokenizer):
    key = key_of(str(book), tokenizer, length=16)
    other = make_tokenizer()
    assert key == key_of(str(book.parent), other, length=16)
    # What a call leaves in a tokenizer is none of its rules.
    other("w1 w2", truncation=True, max_length=1, padding=True)
    assert key == key_of(str(book), other, length=16)
    other.chat_template = TEMPLATE
    assert len({key, key_of(str(book), other, length=16), key_of(str(book), tokenizer, length=8)}) == 3
    other = make_tokenizer()
    other.add_tokens("w0 w1")
    assert key != key_of(str(book), other, length=16)
    renamed = book.rename(book.with_suffix(".md"))
    before = key_of(str(renamed), tokenizer, length=16)
    stamp = renamed.stat()
    renamed.write_text(renamed.read_text().replace("w5 ", "w6 ", 1))
    assert renamed.stat().st_size == stamp.st_size and before != key_of(str(renamed), tokenizer, length=16)


def test_a_damaged_cache_is_made_anew(book, tokenizer, cache, tokenized):
    first = windows_of(str(book), tokenizer, length=16).clone()
    [file] = cache.iterdir()
    for content in (file.read_bytes()[:-4], b"", b"\x80\x04pickle"):
        file.unlink()
        file.write_bytes(content)
        assert torch.equal(windows_of(str(book), tokenizer, length=16), first)
    assert len(tokenized) == 4


def test_without_a_place_for_it_there_is_no_cache(book, tokenizer, tmp_path, monkeypatch):
    for place in ("", str(book)):  # no directory, and one that cannot be made
        monkeypatch.setenv("ELSA_CACHE", place)
        assert windows_of(str(book), tokenizer, length=16).shape == (60, 16)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["book.txt", "texts"]


def test_nothing_stays_when_making_it_fails(book, tokenizer, cache, monkeypatch):
    def broken(self):
        yield torch.zeros(40, dtype=torch.int32).numpy()
        raise OSError("no space")

    monkeypatch.setattr(windows_module._Stream, "pieces", broken)
    with pytest.raises(OSError, match="no space"):
        windows_of(str(book), tokenizer, length=16)
    assert list(cache.iterdir()) == []


def test_a_file_of_tokens_is_mapped(tmp_path):
    """More than it takes to read its header is not read until it is looked at."""
    piece = torch.arange(2**20, dtype=torch.int32).numpy()
    file = tmp_path / "tokens.safetensors"
    assert write_windows(file, (piece for _ in range(64)), length=2**10, most=2**16) == 2**16
    before = _resident()
    windows, _ = read_windows(file, length=2**10)
    assert windows.shape == (2**16, 2**10) and _resident() - before < 2**25 < file.stat().st_size
    assert windows[2**16 - 1].tolist() == piece[-(2**10) :].tolist()
    with pytest.raises(ValueError, match="not windows of 512"):
        read_windows(file, length=512)


def test_a_stream_without_end_is_read_as_far_as_it_is_used(tmp_path):
    def endless():
        while True:
            yield torch.arange(7, dtype=torch.int32).numpy()

    assert write_windows(tmp_path / "tokens", endless(), length=5, most=3) == 3
    assert read_windows(tmp_path / "tokens", length=5)[0].flatten().tolist() == [i % 7 for i in range(15)]


def test_load_texts_is_a_data_set_for_oneshot(book, checkpoint):
    rows = load_texts(book, str(checkpoint()), sequence_length=16, tokens=16 * 4 + 1)
    assert rows.column_names == ["input_ids"] and len(rows) == 5
    assert rows[1]["input_ids"] == windows_of(str(book), make_tokenizer(), length=16)[1].tolist()
    with pytest.raises(ValueError, match="961 tokens; a run takes at least 1,024"):
        load_texts(book, str(checkpoint()), sequence_length=1024)


def _resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096
