"""What the Markdown pages hold: blocks, commands and links."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
]
# The first words of lines that are commands.
PROGRAMS = ("elsa", "lm_eval", "make", "pip", "python", "python3", "sbatch", "sh", "torchrun", "vllm", ".")


_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def prose(page):
    """A page without its fenced blocks."""
    return _FENCED.sub("", page.read_text())


def blocks(*languages):
    """(page, text) of all fenced blocks in one of these languages; '' is without any."""
    for page in PAGES:
        for language, block in _FENCED.findall(page.read_text()):
            if language in languages:
                yield page, block


def commands():
    """(page, words) of each command in a block, fenced or indented: what is optional is there, comments are not."""
    lines = [
        (page, line) for page, block in blocks("", "sh", "bash") for line in block.replace("\\\n", " ").splitlines()
    ]
    lines += [(page, line[4:]) for page in PAGES for line in prose(page).splitlines() if line.startswith("    ")]
    for page, line in lines:
        line = re.sub(r"^(?:[A-Z]+=\S+ )+", "", line)
        if line.split(" ")[0] in PROGRAMS:
            yield page, shlex.split(re.sub(r"[\[\]](?=\s|$|-)|(?<=\s)\[", "", line), comments=True)


def inline_commands():
    """(page, words) of each command between backquotes in running text."""
    for page in PAGES:
        for found in re.findall(r"`((?:elsa|make|python -m|python3 -m) [^`]+)`", prose(page)):
            yield page, shlex.split(found.replace("\n", " "))
