"""Which package imports which: the command line is above both, and a server has no llm-compressor."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sparse.test_writing import OLD_FORMAT

SOURCES = Path(__file__).parents[2] / "src"
HEAVY = ("llmcompressor", "transformers", "elsa_modifier", "compressed_tensors", "accelerate", "datasets")


def _imports(package):
    for file in (SOURCES / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                yield from ((file.name, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield file.name, node.module or ""


@pytest.mark.parametrize(
    "package,above", [("elsa_sparse", ("elsa_modifier", "elsa_cli")), ("elsa_modifier", ("elsa_cli",))]
)
def test_no_package_imports_what_is_above_it(package, above):
    imported = list(_imports(package))
    assert any(module.startswith("torch") for _, module in imported)
    assert [(file, module) for file, module in imported if module.partition(".")[0] in above] == []


@pytest.mark.parametrize("arguments", [["--help"], ["pack", "{old}", "{out}"], ["inspect", "{old}", "--verify"]])
def test_commands_for_sparse_files_do_without_what_prunes(arguments, tmp_path):
    arguments = [argument.format(old=OLD_FORMAT, out=tmp_path / "out") for argument in arguments]
    script = (
        "import sys\n"
        "from elsa_cli.main import app\n"
        f"status = app({arguments!r}, standalone_mode=False)\n"
        f"assert not status and [m for m in {HEAVY} if m in sys.modules] == []\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
