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


def blocks(language):
    """(page, text) of all fenced blocks in a language; without one it is ''."""
    for page in PAGES:
        for found in re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
            yield page, found


def commands():
    """(page, words) of each command in a block, fenced or indented: what is optional is there, comments are not."""
    for page in PAGES:
        text = page.read_text()
        fenced = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        rest = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        indented = [line[4:] for line in rest.splitlines() if line.startswith("    ")]
        for line in [*(line for block in fenced for line in block.replace("\\\n", " ").splitlines()), *indented]:
            line = re.sub(r"^(?:[A-Z]+=\S+ )+", "", line)
            if line.split(" ")[0] in PROGRAMS:
                yield page, shlex.split(re.sub(r"[\[\]](?=\s|$|-)|(?<=\s)\[", "", line), comments=True)


def inline_commands():
    """(page, words) of each command between backquotes in running text."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for found in re.findall(r"`((?:elsa|make|python -m|python3 -m) [^`]+)`", text):
            yield page, shlex.split(found.replace("\n", " "))
