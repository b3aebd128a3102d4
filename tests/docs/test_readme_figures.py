"""What README says of perplexity, memory and speed stands in the pages that commands write."""

import re

import pytest

from tests.docs.pages import ROOT

RESULTS = ROOT / "docs" / "results"


def tables(text):
    """The rows of each table, as lists of cells; without the line below the header."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        yield [row for row in rows if not set("".join(row)) <= set("-: ")]


def section(text, title, level="##"):
    found = re.search(rf"^{level} {re.escape(title)}$(.*?)(?=^{level} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def measured(page, title, column):
    """What a page's table says in this column: by the first cell of its rows, without minutes and marks."""
    header, *rows = next(table for table in tables(section((RESULTS / page).read_text(), title)))
    place = header.index(column)
    return {row[0]: re.sub(r" \([\d.]+\)( [<>])?$", "", row[place]) for row in rows}


METHODS = {"gradual Fisher pruning, with our teacher, at its best learning rate": "gradual Fisher, distilled"}
METHODS |= {"the same with all of our objective": "gradual Fisher, ELSA's objective", "ELSA, as it comes": "ELSA"}


def test_perplexities_are_those_of_the_page():
    readme = section((ROOT / "README.md").read_text(), "How good")
    header, *rows = next(tables(readme))
    assert header[0].startswith("stories260K") and len(rows) >= 4
    for column, sparsity in enumerate(header[1:], start=1):
        found = measured("compare_methods.md", "stories260K", sparsity)
        for row in rows:
            assert row[column] == found[METHODS.get(row[0], row[0])], (row[0], sparsity)


def test_speeds_are_those_of_the_page():
    header, *rows = list(tables(section((ROOT / "README.md").read_text(), "How good")))[1]
    titles, *measured_rows = next(tables(section((RESULTS / "serve_sparse.md").read_text(), "LLaMA-7B's layers")))
    found = {row[0]: dict(zip(titles, row, strict=True)) for row in measured_rows if row[1] == "bf16"}
    assert [row[0] for row in rows] == [*found]
    assert all(row == [found[row[0]][title] for title in header] for row in rows)


@pytest.mark.parametrize(
    "digits",
    [
        "49.8",
        "147.7",
        "53.5",
        "175.8",
        "6.95",
        "6.87",
        "7.44",
        "7.42",
        "500.8",
        "814.2",
        "32,768",
        "110,336",
        "65,536",
        "307,200",
        "35.1",
        "4.72",
    ],
)
def test_numbers_in_its_text_stand_in_the_page(digits):
    assert digits in section((ROOT / "README.md").read_text(), "How good")
    assert digits in (RESULTS / "compare_methods.md").read_text()
