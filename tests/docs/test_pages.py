"""Links lead somewhere, the site has every page, and the reference of recipes is what the fields are."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import yaml

from docs.tools.recipe_reference import PAGE, page
from tests.docs.pages import PAGES, ROOT, prose


def anchors(file):
    headings = re.findall(r"^#+ (.*)$", prose(file), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", PAGES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_to_files(file):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(file)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        place = (file.parent / path).resolve() if path else file
        assert place.exists() and place.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(place), target


def test_every_page_is_in_the_site():
    def files(entry):
        if isinstance(entry, str):
            yield entry
        else:
            for value in entry.values() if isinstance(entry, dict) else entry:
                yield from files(value)

    nav = list(files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    docs = ROOT / "docs"
    assert sorted(nav) == sorted(str(file.relative_to(docs)) for file in docs.rglob("*.md"))


def test_the_recipe_reference_is_that_of_the_code():
    assert PAGE.read_text() == page(), "python -m docs.tools.recipe_reference"


class Resources(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        fetched = [named.get("src"), named.get("srcset")] + ([named.get("href")] if tag == "link" else [])
        self.found += [value for value in fetched if value and re.match(r"(https?:)?//", value)]


def test_the_site(tmp_path):
    """Built strictly, without a warning; its pages fetch nothing from elsewhere."""
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = [*(tmp_path / "site").rglob("*.html")]
    assert len(pages) > 30
    assert [found for file in pages for found in Resources(file.read_text()).found] == []
    styles = [file.read_text() for file in (tmp_path / "site").rglob("*.css")]
    assert [found for style in styles for found in re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style)] == []


def test_it_would_notice_a_resource():
    assert Resources('<script src="https://x/y.js"></script><link href="//x"><a href="https://x">').found == [
        "https://x/y.js",
        "//x",
    ]
