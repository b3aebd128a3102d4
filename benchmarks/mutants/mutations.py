"""Small faults to put into the sources: mutmut's operators, applied to every place that decides something."""

import difflib
import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libcst as cst
from libcst.metadata import CodeRange, MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_arg_removal

__all__ = ["GROUPS", "Mutant", "all_mutants", "sample"]

# vllm_loader.py runs inside a server, with tests of its own (`make serve-test`).
GROUPS: dict[str, tuple[str, ...]] = {
    "admm": ("elsa_modifier/admm/*.py",),
    "training": ("elsa_modifier/training/*.py",),
    "modifier": ("elsa_modifier/*.py",),
    "quantization": ("elsa_modifier/quantization/*.py",),
    "elsa_sparse": ("elsa_sparse/*.py",),
}
_LEFT_OUT = {"elsa_sparse/vllm_loader.py"}
# Their arguments are words for people.
_SAYS = {"print", "logger", "Option", "Argument", "Typer", "set_postfix_str", "tqdm", "add_column", "Table"}
# Nothing but a TypeError comes of mutating their arguments.
_UNTOUCHED = {"len", "isinstance"}
# Keywords that say what is always so (zip's), or that only an accelerator tells apart.
_UNSEEN = {"strict", "device"}
_NO_CODE = (cst.Annotation, cst.Raise, cst.Decorator, cst.Import, cst.ImportFrom, cst.FormattedString)


@dataclass(frozen=True)
class Mutant:
    """One fault.

    :param group: key of ``GROUPS``
    :param file: below ``src``
    :param line: of the mutated code, from 1
    :param operator: mutmut's name of the kind of fault
    :param before: the changed lines as they are, stripped and joined
    :param after: the same lines with the fault
    :param source: the whole file with the fault
    """

    group: str
    file: str
    line: int
    operator: str
    before: str
    after: str
    source: str

    @property
    def id(self) -> str:
        """The same for the same fault in the same file."""
        return f"{self.file}:{self.line}:{hashlib.sha256(self.source.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class _Place:
    group: str
    file: str
    module: cst.Module
    node: cst.CSTNode
    mutated: cst.CSTNode
    line: int
    operator: str

    def mutant(self) -> Mutant:
        # Typed for nodes in general; of a module it makes a module.
        module: Any = self.module.deep_replace(self.node, self.mutated)
        before, after = self.module.code.splitlines(), module.code.splitlines()
        changes = list(difflib.ndiff(before, after)) if len(before) != len(after) else _changes(before, after)
        removed, added = (" ".join(c[2:].strip() for c in changes if c.startswith(sign)) for sign in ("- ", "+ "))
        return Mutant(self.group, self.file, self.line, self.operator, removed, added, module.code)


def _changes(before: list[str], after: list[str]) -> list[str]:
    return [line for a, b in zip(before, after, strict=True) if a != b for line in (f"- {a}", f"+ {b}")]


class _Finder(cst.CSTVisitor):
    """Collects (node, mutated node, line, operator), leaving out annotations, messages and declarations."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        self.found: list[tuple[cst.CSTNode, cst.CSTNode, int, str]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, _NO_CODE):
            return False
        if isinstance(node, cst.Assign) and _is_declaration(node):
            return False
        if isinstance(node, cst.Arg) and node.keyword and node.keyword.value in _UNSEEN:
            return False
        name = _called(node)
        if name & _SAYS:
            return False
        if not name & _UNTOUCHED:
            self.found += [(node, mutated, self._line(node), operator) for mutated, operator in _mutations(node)]
        return True

    def _line(self, node: cst.CSTNode) -> int:
        position: CodeRange = self.get_metadata(PositionProvider, node)
        return int(position.start.line)


def _mutations(node: cst.CSTNode) -> Iterator[tuple[cst.CSTNode, str]]:
    for kind, operator in mutation_operators:
        if isinstance(node, kind):
            mutated = list(operator(node))
            if isinstance(node, cst.BaseString):
                # The first is another string, the others are other cases of its letters.
                mutated = mutated[:1]
            elif operator is operator_arg_removal:
                mutated = [other for other in mutated if isinstance(other, cst.Call) and _lacks_an_option(node, other)]
            for other in mutated:
                yield other, operator.__name__.removeprefix("operator_")


def _lacks_an_option(call: cst.Call, other: cst.Call) -> bool:
    """Whether ``other`` leaves a keyword out. What leaves a position out, or makes it None, is a TypeError at best."""
    keywords, left = ([arg.keyword.value for arg in c.args if arg.keyword] for c in (call, other))
    return len(left) < len(keywords) and not (set(keywords) - set(left)) & _UNSEEN


def _is_declaration(node: cst.Assign) -> bool:
    target = node.targets[0].target
    return isinstance(target, cst.Name) and target.value.startswith("__")


def _called(node: cst.CSTNode) -> set[str]:
    """Names in what a call calls: ``logger.info(...)`` gives both."""
    names, function = set(), getattr(node, "func", None)
    while isinstance(function, cst.Attribute):
        names.add(function.attr.value)
        function = function.value
    return names | ({function.value} if isinstance(function, cst.Name) else set())


def all_mutants(source: Path) -> Iterator[_Place]:
    """Every place of every group in a ``src`` directory."""
    for group, patterns in GROUPS.items():
        for path in sorted(path for pattern in patterns for path in source.glob(pattern)):
            file = str(path.relative_to(source))
            if file not in _LEFT_OUT:
                wrapper = MetadataWrapper(cst.parse_module(path.read_text()))
                finder = _Finder()
                wrapper.visit(finder)
                yield from (_Place(group, file, wrapper.module, *found) for found in finder.found)


def sample(places: Iterable[_Place], count: int, seed: int) -> list[Mutant]:
    """``count`` mutants, as many of each group as its share of all; fewer are a prefix of more."""
    groups: dict[str, list[_Place]] = {}
    for place in places:
        groups.setdefault(place.group, []).append(place)
    ranked = []
    for group, members in groups.items():
        random.Random(f"{seed} {group}").shuffle(members)
        ranked += [((rank + 0.5) / len(members), group, place) for rank, place in enumerate(members)]
    ranked.sort(key=lambda entry: entry[:2])
    return [place.mutant() for _, _, place in ranked[:count]]
