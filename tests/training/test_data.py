import pytest
import torch
from datasets import Dataset
from llmcompressor.datasets.utils import DataCollatorWithTruncation
from loguru import logger
from torch.utils.data import DataLoader

from elsa_modifier.training.data import (
    IGNORED_LABEL,
    LoaderBatches,
    PackedBatches,
    batches_from_calibration,
    pack_documents,
)


def dataset(*documents, **columns):
    return Dataset.from_dict({"input_ids": list(documents)} | columns)


def pack(data, **options):
    return pack_documents(data, **({"length": 4, "max_tokens": 10**6, "separator": 0, "seed": 0} | options))


def test_documents_are_packed_whole_and_separated():
    ids, labels = pack(dataset([1, 2, 3], [4, 5, 6, 7, 8], [9]))
    assert torch.equal(ids, labels)
    stream = ids.flatten().tolist()
    # 9 tokens and 3 separators fill three sequences; each document is in one piece.
    assert ids.shape == (3, 4)
    text = "".join(map(str, stream))
    assert sorted(filter(None, text.split("0"))) == ["123", "45678", "9"]


def test_a_document_that_ends_with_the_separator_gets_no_second_one():
    ids, _ = pack(dataset([1, 2, 3, 0]), length=2)
    assert ids.flatten().tolist() == [1, 2, 3, 0]


def test_full_windows_are_taken_as_they_are():
    ids, _ = pack(dataset([1, 2, 3, 4], [5, 6, 7, 8]))
    assert sorted(ids.tolist()) == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_padding_is_dropped():
    data = dataset([1, 2, 3, 9, 9], [9, 9, 4, 5], attention_mask=[[1, 1, 1, 0, 0], [0, 0, 1, 1]])
    ids, _ = pack(data, separator=None, length=5)
    assert sorted(ids.flatten().tolist()) == [1, 2, 3, 4, 5]


def test_labels_travel_with_their_tokens():
    data = dataset([1, 2, 3], [4, 5, 6], labels=[[IGNORED_LABEL, 2, 3], [IGNORED_LABEL, 5, 6]])
    ids, labels = pack(data, separator=None, length=6)
    for token, label in zip(ids.flatten().tolist(), labels.flatten().tolist(), strict=True):
        assert label == (IGNORED_LABEL if token in (1, 4) else token)


def test_no_more_is_read_than_the_run_can_use():
    data = dataset(*[[1] * 50] * 2000)
    ids, _ = pack(data, length=10, max_tokens=100, separator=None)
    assert 100 <= ids.numel() < 50 * 512


def test_less_than_a_sequence_is_refused():
    with pytest.raises(ValueError, match=r"holds 4 tokens, and a sequence takes 16.*sequence_length to 4 or less"):
        pack(dataset([1, 2, 3]), length=16)
    assert pack(dataset([1, 2, 3]), length=4)[0].tolist() == [[1, 2, 3, 0]]


@pytest.mark.parametrize("column", ["labels", "attention_mask"])
@pytest.mark.parametrize("entries", [2, 4])
def test_a_row_with_more_or_fewer_labels_than_tokens_is_refused(column, entries):
    rows = [[1] * 3, [1] * 3, [1] * entries, [1] * 3]
    with pytest.raises(ValueError, match=rf"row 2 of the dataset .* has 3 input_ids and {entries} entries in {column}"):
        pack(dataset(*[[7, 8, 9]] * 4, **{column: rows}))


@pytest.mark.parametrize("column", ["labels", "attention_mask"])
def test_a_batch_with_more_or_fewer_labels_than_tokens_is_refused(column):
    right = {"input_ids": torch.ones(3, dtype=torch.int64), column: torch.ones(3, dtype=torch.int64)}
    wrong = right | {column: torch.ones(2, dtype=torch.int64)}
    source = LoaderBatches(DataLoader([right, wrong]), accumulation=1)
    source.micro_batches(0)
    with pytest.raises(ValueError, match=rf"batch 1 of the DataLoader .*'input_ids': \(1, 3\), '{column}': \(1, 2\)"):
        source.micro_batches(1)


def test_batches_without_a_dimension_of_sequences_are_refused():
    source = LoaderBatches(DataLoader([{"input_ids": torch.ones(3)}], batch_size=None), accumulation=1)
    with pytest.raises(ValueError, match=r"allowed is \(sequences, tokens\)"):
        source.micro_batches(0)


@pytest.mark.parametrize("packable", [True, False])
@pytest.mark.parametrize("steps,level", [(10, "INFO"), (11, "WARNING")])
def test_how_often_the_text_is_gone_over_is_said(packable, steps, level):
    """Five sequences, two a step."""
    told = []
    handler = logger.add(lambda message: told.append(message.record), level="INFO")
    data = dataset(*[[1, 2, 3, 4]] * 5)
    loader = DataLoader(data, batch_size=2, collate_fn=DataCollatorWithTruncation() if packable else None)
    if not packable:  # three batches, of which the last is short
        steps = steps * 3 * 2 // 5
    batches_from_calibration(loader, steps=steps, batch_size=2, accumulation=1, length=4, separator=None, seed=0)
    logger.remove(handler)
    (record,) = [record for record in told if "goes over this text" in record["message"]]
    assert record["level"].name == level
    assert f"{4.0 if level == 'INFO' else 4.4 if packable else 4.3} times" in record["message"]


def test_document_order_is_drawn_from_the_seed():
    data = dataset(*[[i] * 4 for i in range(1, 40)])
    first, again, other = (pack(data, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert sorted(first.tolist()) == sorted(other.tolist())


def packed(count, seed=0, batch_size=2, accumulation=1):
    ids = torch.arange(count, dtype=torch.int32).unsqueeze(1).repeat(1, 3)
    return PackedBatches(ids, ids, batch_size=batch_size, accumulation=accumulation, seed=seed)


def visited(source, steps):
    return [int(row[0]) for step in steps for batch in source.micro_batches(step) for row in batch["input_ids"]]


def test_every_epoch_visits_every_sequence_once_in_its_own_order():
    order = visited(packed(6), range(6))
    assert sorted(order[:6]) == sorted(order[6:]) == list(range(6))
    assert order[:6] != order[6:]


def test_order_depends_on_seed_and_step_alone():
    assert visited(packed(7), [5]) == visited(packed(7), range(6))[10:]
    assert visited(packed(7, seed=1), range(4)) != visited(packed(7), range(4))


def test_accumulation_reads_the_same_sequences():
    whole = visited(packed(9, batch_size=4), range(3))
    parts = packed(9, batch_size=2, accumulation=2)
    assert visited(parts, range(3)) == whole
    assert [len(b["labels"]) for b in parts.micro_batches(0)] == [2, 2]


def test_loader_is_cycled_and_padding_masked():
    rows = [{"input_ids": torch.tensor([1, 2, 9]), "attention_mask": torch.tensor([1, 1, 0])}]
    source = LoaderBatches(DataLoader(rows), accumulation=2)
    for _ in range(2):
        first, second = source.micro_batches(0)
        assert first["labels"].tolist() == second["labels"].tolist() == [[1, 2, IGNORED_LABEL]]


def test_loaders_labels_are_kept():
    rows = [{"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([IGNORED_LABEL, 2, 3])}]
    (batch,) = LoaderBatches(DataLoader(rows), accumulation=1).micro_batches(0)
    assert batch["labels"].tolist() == [[IGNORED_LABEL, 2, 3]]


@pytest.mark.parametrize("rows,message", [([], "yields no batch"), ([torch.ones(3)], "mapping with 'input_ids'")])
def test_unusable_loaders_are_refused(rows, message):
    source = LoaderBatches(DataLoader(rows, batch_size=1), accumulation=1)
    with pytest.raises(ValueError, match=message):
        source.micro_batches(0)


def test_only_loaders_that_llmcompressor_made_are_taken_apart():
    data = dataset(*[[1, 2, 3, 4]] * 5)
    options = dict(steps=2, batch_size=2, accumulation=1, length=4, separator=None, seed=0)
    made = DataLoader(data, collate_fn=DataCollatorWithTruncation())
    assert isinstance(batches_from_calibration(made, **options), PackedBatches)
    assert isinstance(batches_from_calibration(DataLoader(data), **options), LoaderBatches)
    own = DataLoader([{"input_ids": torch.tensor([1])}], collate_fn=DataCollatorWithTruncation())
    assert isinstance(batches_from_calibration(own, **options), LoaderBatches)
