"""Python in the Markdown pages is about what exists: arguments of ``oneshot``, names of this package and of recipes."""

import ast
import inspect
import re
from pathlib import Path

import pytest
from llmcompressor import oneshot

import elsa_modifier

ROOT = Path(__file__).parent.parent
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{i}")
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")]
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE))
]


def test_there_are_some():
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize("block", BLOCKS)
def test_what_it_names_exists(block):
    for node in ast.walk(ast.parse(block)):
        match node:
            case ast.Call(func=ast.Name(id="oneshot")):
                allowed = inspect.signature(oneshot).parameters.keys()
                assert {keyword.arg for keyword in node.keywords} <= allowed
            case ast.Call(func=ast.Attribute(value=ast.Name(id="elsa_modifier"), attr="recipe"), args=[name]):
                elsa_modifier.recipe(ast.literal_eval(name))
            case ast.Attribute(value=ast.Name(id="elsa_modifier"), attr=attribute):
                assert hasattr(elsa_modifier, attribute)
            case ast.ImportFrom(module="elsa_modifier"):
                assert all(hasattr(elsa_modifier, alias.name) for alias in node.names)
