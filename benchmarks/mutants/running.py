"""Tests in forked processes that share what is slow to import; which test runs which line."""

import ast
import gc
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import coverage
import pytest

from benchmarks.mutants.mutations import Mutant

__all__ = ["ROOT", "Coverage", "Run", "preload", "tree_hash"]

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("elsa_modifier", "elsa_sparse")
# Slow to import, and nothing in them depends on what is mutated.
_SHARED = {
    *("torch", "transformers", "llmcompressor", "compressed_tensors", "datasets", "accelerate", "torchao"),
    *("hypothesis", "safetensors", "tokenizers", "pydantic", "typer", "rich", "numpy"),
}
# A mutant may ask for any amount of either.
_MEMORY, _FILE = 12 * 2**30, 2**30


def tree_hash() -> str:
    """Of sources and tests: results of another tree are not this one's."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("src", "tests") for path in (ROOT / folder).rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def preload(modules: list[str]) -> None:
    """Import what every run would import again; children that are forked have it."""
    for name in modules:
        with suppress(Exception):
            importlib.import_module(name)
    loaded = [name for name in sys.modules if name.split(".")[0] in (*_PACKAGES, "tests")]
    # Arrow keeps one thread, which waits; torch's would be more, and a child would wait for them.
    threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
    assert not loaded and threads <= 2, f"cannot fork: {loaded} are imported, {threads} threads run"
    gc.collect()
    gc.freeze()


class _Plugin:
    """Runs the tests of ``order`` alone, in that order, each in a coverage context of its own."""

    def __init__(self, order: list[str] | None, measure: coverage.Coverage | None) -> None:
        self._rank = None if order is None else {test: rank for rank, test in enumerate(order)}
        self._measure = measure
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if (rank := self._rank) is not None:
            items[:] = sorted((item for item in items if item.nodeid in rank), key=lambda item: rank[item.nodeid])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if self._measure:
            self._measure.switch_context(item.nodeid)
        started = time.perf_counter()
        result = yield
        self.seconds[item.nodeid] = round(time.perf_counter() - started, 4)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


@dataclass
class Run:
    """A child process that runs tests on a copy of the sources.

    :param tests: node ids, in order; the first failure ends the run. None for all tests, whatever fails
    :param mutant: what to put into the copy; None leaves it as it is
    :param limit: seconds after which the run is ended
    """

    tests: list[str] | None
    mutant: Mutant | None
    limit: float
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="mutant-"))
        self.source = self.directory / "src"
        shutil.copytree(ROOT / "src", self.source, ignore=shutil.ignore_patterns("__pycache__"))
        # Where a package in a checkout looks for them.
        (self.directory / "recipes").symlink_to(ROOT / "recipes")
        if self.mutant:
            (self.source / self.mutant.file).write_text(self.mutant.source)
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                code = self._child()
            finally:
                os._exit(code)

    def _child(self) -> int:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE, _FILE))
        with (self.directory / "output").open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.chdir(self.directory)
        sys.path.insert(0, str(self.source))
        os.environ["PYTHONPATH"] = str(self.source)
        measure = None
        if self.tests is None:
            sources = [str(self.source / package) for package in _PACKAGES]
            measure = coverage.Coverage(data_file=str(self.directory / "data"), source=sources, config_file=False)
            measure.start()
        plugin = _Plugin(self.tests, measure)
        files = ["tests"] if self.tests is None else list(dict.fromkeys(test.split("::")[0] for test in self.tests))
        options = ["-p", "no:cacheprovider", "--basetemp", str(self.directory / "tmp"), "--rootdir", str(ROOT)]
        options += ["-c", str(ROOT / "pyproject.toml"), *(["-x"] if self.tests is not None else [])]
        code = int(pytest.main([*options, *(str(ROOT / file) for file in files)], plugins=[plugin]))
        result: dict[str, Any] = {"seconds": plugin.seconds, "failed": plugin.failed}
        if measure:
            measure.stop()
            data = measure.get_data()
            measured = {path: str(Path(path).relative_to(self.source)) for path in data.measured_files()}
            result["lines"] = {name: data.contexts_by_lineno(path) for path, name in measured.items()}
            result["modules"] = [name for name in sys.modules if name.split(".")[0] in _SHARED and "._" not in name]
        (self.directory / "result.json").write_text(json.dumps(result))
        return code

    def poll(self) -> tuple[str, dict[str, Any]] | None:
        """None while it runs; then ``passed``, ``killed``, ``timeout``, or ``broken`` (no test ran), and its result."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        outcome = None
        if pid:
            code = os.waitstatus_to_exitcode(status)
            outcome = {0: "passed", 5: "broken"}.get(code, "killed")
        elif time.monotonic() - self.started > self.limit:
            outcome = "timeout"
        if outcome is None:
            return None
        file = self.directory / "result.json"
        result = json.loads(file.read_text()) if file.exists() else {"seconds": {}, "failed": []}
        result["output"] = (self.directory / "output").read_text(errors="replace")[-4000:] if not file.exists() else ""
        self.stop()
        return outcome, result

    def stop(self) -> None:
        """End it, without a result; nothing is left of it."""
        with suppress(ChildProcessError):
            os.waitpid(self._kill(), 0)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _kill(self) -> int:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        return self.pid


class Coverage:
    """Which tests run which line, and how long each takes: of one run of the whole suite, which must pass."""

    def __init__(self, cache: Path) -> None:
        if not cache.exists():
            cache.parent.mkdir(parents=True, exist_ok=True)
            print("running the suite once, to see which test runs which line", flush=True)
            run = Run(None, None, limit=3600)
            try:
                outcome = _wait(run.poll)
            finally:
                run.stop()
            if outcome[0] != "passed":
                raise SystemExit(f"the suite must pass before mutants mean anything; failed: {outcome[1]['failed']}")
            cache.write_text(json.dumps(outcome[1]))
        measured = json.loads(cache.read_text())
        self.seconds: dict[str, float] = measured["seconds"]
        self.modules: list[str] = measured["modules"]
        self._lines: dict[str, dict[str, list[str]]] = measured["lines"]

    def tests(self, mutant: Mutant) -> list[str]:
        """The tests that run the statement, fastest first. If it runs at import, those of its function or file."""
        lines = {int(line): set(tests) for line, tests in self._lines.get(mutant.file, {}).items()}
        found: set[str] = set()
        for first, last in _spans(ast.parse((ROOT / "src" / mutant.file).read_text()), mutant.line):
            found = set().union(*(tests for line, tests in lines.items() if first <= line <= last))
            if found != {""}:
                break
        return sorted(found - {""}, key=lambda test: self.seconds.get(test, 0.0))


def _spans(tree: ast.Module, line: int) -> list[tuple[int, int]]:
    """First and last lines of what holds a line: its statement (of a compound one the head), what defines it, all.

    What a cache holds was computed in one test and is used in others: of such a function, all of the file.
    """
    spans = {"statement": (line, line), "definition": (1, sys.maxsize)}
    for node in ast.walk(tree):  # outer ones first
        if isinstance(node, ast.stmt) and node.lineno <= line <= (end := node.end_lineno or node.lineno):
            body = getattr(node, "body", None)
            spans["statement"] = (node.lineno, max(node.lineno, body[0].lineno - 1 if body else end))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                spans["definition"] = (node.lineno, end)
                if any("cache" in ast.unparse(decorator) for decorator in node.decorator_list):
                    return [(1, sys.maxsize)]
    return [*spans.values(), (1, sys.maxsize)]


def _wait(poll: Callable[[], tuple[str, dict[str, Any]] | None]) -> tuple[str, dict[str, Any]]:
    while (outcome := poll()) is None:
        time.sleep(0.05)
    return outcome
