"""Old names in recipes: they work with a warning, or say what to write instead."""

import pytest

from elsa_modifier import ELSAModifier, Penalty
from elsa_modifier.deprecation import Removed, Renamed, with_current_names

CHANGES = {"old": Renamed("new", "0.3"), "gone": Removed("write new instead"), "lost": Removed("write new instead")}


def test_a_renamed_field_works_and_warns():
    given = {"old": 3, "other": 4}
    with pytest.warns(FutureWarning, match=r"part\.old is called part\.new now; .* until elsa-modifier 0\.3"):
        assert with_current_names(given, CHANGES, "part.") == {"new": 3, "other": 4}
    assert given == {"old": 3, "other": 4}


def test_current_fields_are_left_alone(recwarn):
    for given in ({"new": 3}, {}, "name", 3, None):
        assert with_current_names(given, CHANGES) is given
    assert not recwarn


def test_both_names_are_refused():
    with pytest.raises(ValueError, match="old is the old name of new, and both are set; leave old out"):
        with_current_names({"old": 1, "new": 1}, CHANGES)


def test_a_removed_field_says_what_to_write():
    with pytest.raises(ValueError, match="gone: 1, lost: 2: write new instead"):
        with_current_names({"lost": 2, "gone": 1}, CHANGES)
    with pytest.raises(
        ValueError, match=r"penalty\.free_support: True: kept weights move freely.* choose penalty\.form"
    ):
        Penalty(free_support=True)
    with pytest.raises(ValueError, match=r"penalty\.free_support: False"):
        ELSAModifier(sparsity=0.5, penalty={"free_support": False})
