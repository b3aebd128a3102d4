"""Every architecture of docs/architectures.md: what is saved is the model that was trained, or the run is refused."""

import re

import pytest

from tests.architectures import ARCHITECTURES, PAGE, outcome_of, page


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_what_is_read_back_is_what_was_trained(architecture):
    found = outcome_of(architecture.name)
    if architecture.refused is not None:
        assert found.refused is not None and re.search(architecture.refused, found.refused)
        return
    assert found.refused is None
    assert found.keys == () and found.untouched
    assert found.difference < 1e-5 < found.moved
    assert found.zeros == found.entries // 2 > 0
    assert found.saved_zeros[0] == found.saved_zeros[1] >= found.zeros


def test_the_page_says_so():
    assert PAGE.read_text() == page()
