import pytest
from datasets import Dataset

from elsa_modifier.training.data import pack_documents


def _packed(*documents, **options):
    settings = {"length": 4, "max_tokens": 100, "separator": None, "seed": 0} | options
    return pack_documents(Dataset.from_dict({"input_ids": [list(d) for d in documents]}), **settings)


def test_one_sequence_is_enough_and_a_token_less_is_not():
    ids, labels = _packed([3, 4, 5, 6])
    assert ids.tolist() == labels.tolist() == [[3, 4, 5, 6]]
    with pytest.raises(ValueError, match="the dataset holds 3 tokens, and a sequence takes 4"):
        _packed([3, 4, 5])


def test_no_more_than_one_part_of_documents_is_read_beyond_what_is_used():
    """Rows come 256 at a time: what the first ones hold is exactly enough, or one token short of it."""
    documents = [[i % 7] * 2 for i in range(600)]
    read = {n: len(_packed(*documents, max_tokens=n)[0]) for n in (507, 508, 509)}
    assert read == {507: 128, 508: 128, 509: 256}
