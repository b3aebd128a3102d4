"""What a directory says about the model in it: files that other commands wrote, and the sizes of its tensors."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elsa_modifier.evaluating.record import EVALUATION_FILE, Evaluation
from elsa_modifier.pruning.summary import Summary
from elsa_modifier.saving import HISTORY_FILE
from elsa_modifier.tracking import METRICS_FILE
from elsa_sparse.checkpoint import CONFIG_FILE
from elsa_sparse.errors import SparseCheckpointError, printable
from elsa_sparse.files import MAX_JSON_BYTES, read_bounded, read_json
from elsa_sparse.inspecting import Row, by_layer, inspect, summarize
from elsa_sparse.opening import architecture_of, is_sparse
from elsa_sparse.sources import BENCH_FILE

__all__ = ["Facts", "Matrix", "gather", "matrices_of"]

_RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A weight matrix of a numbered layer; of experts that differ in their number alone, all of a layer.

    :param layer: its number
    :param kind: its name within the layer, such as ``self_attn.q_proj``
    :param weights: entries
    :param sparsity: fraction of zeros
    """

    layer: int
    kind: str
    weights: int
    sparsity: float


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that is known of a directory. What a file that is not there would say is None, or empty.

    :param architecture: class of the model
    :param sparse: whether it is stored in the sparse format
    :param fields: of the recipe's ELSAModifier, with defaults
    :param recipe: ``recipe.yaml``
    :param steps: a record a step, as :class:`~elsa_modifier.training.loop.StepRecord` has it
    :param unreached: targets that stayed dense, as no text reached them
    :param bench: what ``elsa bench --json`` printed
    :param layers: rows of ``elsa inspect``
    :param files_bytes: of all files of weights in the directory
    """

    directory: Path
    name: str
    architecture: str | None
    sparse: bool
    fields: Mapping[str, Any]
    recipe: str | None
    steps: tuple[Mapping[str, Any], ...]
    unreached: tuple[str, ...]
    summary: Summary | None
    evaluation: Evaluation | None
    bench: Mapping[str, Any] | None
    matrices: tuple[Matrix, ...]
    layers: tuple[Row, ...]
    total: Row
    files_bytes: int

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the matrices of all layers that have any."""
        pruned = self.pruned
        return sum(m.sparsity * m.weights for m in pruned) / max(1, sum(m.weights for m in pruned))

    @property
    def pruned(self) -> tuple[Matrix, ...]:
        """Those that have zeros: a trained weight has none by itself, or hardly any."""
        return tuple(m for m in self.matrices if m.sparsity > 0.01)

    @property
    def tokens(self) -> int:
        """Predicted in all steps."""
        return sum(int(step.get("tokens", 0)) for step in self.steps)


def gather(directory: Path, *, progress: bool = True) -> Facts:
    """Read a directory. Weights of a dense checkpoint are read to count zeros, of a sparse one only its table.

    :raises ValueError: if it holds no checkpoint, or a file is not what the command that writes it would write
    :raises OSError: if one cannot be read
    """
    config = read_json(directory / CONFIG_FILE)
    rows = inspect(directory, progress=progress)
    history = _history(directory)
    recipe = directory / _RECIPE_FILE
    return Facts(
        directory=directory,
        name=printable(directory.resolve().name, 80),
        architecture=architecture_of(config),
        sparse=is_sparse(config),
        fields=_mapping(history.get("modifier")),
        recipe=read_bounded(recipe, 10**6).decode("utf-8", "replace") if recipe.is_file() else None,
        steps=tuple(_steps(history.get("steps", []), directory / HISTORY_FILE)),
        unreached=tuple(map(str, history.get("unreached") or ())),
        summary=Summary.read(directory),
        evaluation=Evaluation.read(directory) if (directory / EVALUATION_FILE).is_file() else None,
        bench=_bench(directory / BENCH_FILE),
        matrices=matrices_of(rows),
        layers=tuple(by_layer(rows)),
        total=summarize("total", rows),
        files_bytes=sum(file.stat().st_size for file in directory.glob("*.safetensors")),
    )


def matrices_of(rows: Iterable[Row]) -> tuple[Matrix, ...]:
    """The matrices of numbered layers, in order of layers and then of first appearance."""
    found: dict[tuple[int, str], list[Row]] = {}
    kinds: dict[str, None] = {}
    for row in rows:
        match = re.match(r".*?\.(\d{1,6})\.(.+?)(?:\.weight(?:_packed)?)?$", row.name)
        if match is None or not row.weights:
            continue
        kind = re.sub(r"\.\d+\.", ".*.", match[2])
        kinds[kind] = None
        found.setdefault((int(match[1]), kind), []).append(row)
    order = list(kinds)
    matrices = []
    for layer, kind in sorted(found, key=lambda key: (key[0], order.index(key[1]))):
        whole = summarize(kind, found[layer, kind])
        matrices.append(Matrix(layer=layer, kind=kind, weights=whole.weights, sparsity=whole.sparsity))
    return tuple(matrices)


def _history(directory: Path) -> dict[str, Any]:
    """The history beside the model; or, where there is none, what the run has written of itself so far."""
    if (directory / HISTORY_FILE).is_file():
        return read_json(directory / HISTORY_FILE)
    metrics = directory.with_name(f"{directory.resolve().name}-training") / METRICS_FILE
    if not metrics.is_file():
        return {}
    steps = []
    for number, line in enumerate(read_bounded(metrics, MAX_JSON_BYTES).splitlines(), 1):
        try:
            steps.append(json.loads(line))
        except ValueError as error:
            raise SparseCheckpointError(f"line {number} is not JSON: {error}", file=metrics) from error
    return {"steps": steps}


def _steps(found: Any, file: Path) -> Iterable[Mapping[str, Any]]:
    if not isinstance(found, list):
        raise SparseCheckpointError("steps is no list; delete the file to report without it", file=file)
    for number, step in enumerate(found, 1):
        values = step.values() if isinstance(step, dict) else [None]
        if not all(isinstance(value, (int, float)) for value in values) or "step" not in step:
            raise SparseCheckpointError(f"record {number} of steps is not one of numbers, with a step", file=file)
        yield step


def _mapping(found: Any) -> Mapping[str, Any]:
    return found if isinstance(found, dict) else {}


def _bench(file: Path) -> Mapping[str, Any] | None:
    if not file.is_file():
        return None
    found = read_json(file)
    speeds = found.get("speeds")
    numbers = ("batch", "dense", "compressed", "ratio", "slowest", "fastest")
    if not isinstance(speeds, list) or not all(
        isinstance(speed, dict) and all(isinstance(speed.get(name), (int, float)) for name in numbers)
        for speed in speeds
    ):
        raise SparseCheckpointError("is not what `elsa bench DIR --json` prints; make it anew, or delete it", file=file)
    return found
