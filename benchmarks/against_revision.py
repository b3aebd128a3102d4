"""The optimizer's step and its projection as they are against those of an earlier revision: times in turn, and bits.

Both revisions are Python processes that wait for each other: every measurement of one is followed by the same one of
the other. The earlier one runs in a git worktree of its own. What is run is all that both have: the updates on
SmolLM2-135M's shapes with random values, selection, and small runs whose weights at the end are compared bit for bit.
Writes ``docs/results/against_revision.md``.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measuring import ROOT, publish, timed
from elsa_modifier.admm import ADMMOptimizer, MaskStructure, PenaltySchedule, PrunedWeight, SharedBudget
from elsa_modifier.admm.selection import largest_mask
from elsa_modifier.training.base_optimizer import build_base_optimizer

# Updates were first compiled, and masks first chosen together, in the revision after this one.
BEFORE = "236ed94^"
# SmolLM2-135M's Linears, and its embedding.
_SHAPES = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)] * 30
_EMBEDDING = (49152, 576)
_CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "fp32, adam": {},
    "fp32, adam, dual in fp32": {"dual": True},
    "fp32, adam, dual in int8": {"dual": True, "state_dtype": "int8"},
    "fp32, adam, coupled": {"form": "coupled", "dual": True},
    "bf16, adam8bit_sr (ELSA-L)": {"lean": True},
}
_SELECTED = 45_000_000
_ANSWER = "answer: "


def _optimizer(
    shapes: list[tuple[int, int]], *, lean: bool = False, freeze_step: int = 10**9, seed: int = 0, **options: Any
) -> tuple[ADMMOptimizer, list[nn.Parameter]]:
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if lean else torch.float32
    parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    base = build_base_optimizer("adam8bit_sr" if lean else "adam", parameters, lr=1e-3, betas=(0.9, 0.999), seed=seed)
    weights = [PrunedWeight(f"w{i}", p, p.numel() // 5, MaskStructure()) for i, p in enumerate(parameters[:-1])]
    optimizer = ADMMOptimizer(
        base,
        weights,
        penalty=PenaltySchedule(1e-3 if options.get("form") == "coupled" else 0.3, "constant", 1),
        interval=10**9 if freeze_step == 10**9 else 4,
        freeze_step=freeze_step,
        budget=SharedBudget(0.0, 0.99),
        **options,
    )
    return optimizer, parameters


def _bits(options: dict[str, Any], seed: int) -> str:
    """A checksum of weights and masks after a run of 40 steps, of which the mask is fixed for 8."""
    shapes = [(48, 64), (33, 20), (96, 64)]
    optimizer, parameters = _optimizer(shapes, freeze_step=32, seed=seed, **options)
    targets = [torch.randn(shape) for shape in shapes]
    for _ in range(40):
        for parameter, target in zip(parameters, targets, strict=True):
            parameter.grad = (parameter.detach().float() - target + 0.1 * torch.randn(target.shape)).to(parameter.dtype)
            optimizer.mask_gradient_(parameter)
        optimizer.step()
    found = hashlib.sha256()
    for tensor in [*parameters, *optimizer.masks.values()]:
        found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def serve() -> None:
    """Answer requests, a line of JSON each, on standard input: what a process of either revision does."""
    optimizer: ADMMOptimizer | None = None
    scores = torch.rand(_SELECTED)
    for line in sys.stdin:
        what, name, seed = json.loads(line)
        answer: Any = None
        if what == "make":
            optimizer, parameters = _optimizer([*_SHAPES, _EMBEDDING], **_CONFIGURATIONS[name])
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        elif what == "bits":
            answer = _bits(_CONFIGURATIONS[name], seed)
        elif what == "selection":
            answer = timed(lambda: largest_mask(scores, _SELECTED // 5))
        else:
            assert optimizer is not None
            answer = timed(optimizer.step if what == "step" else optimizer.project)
        print(_ANSWER + json.dumps(answer), flush=True)


class _Revision:
    """A process that has the package of one tree, and this module."""

    def __init__(self, tree: Path) -> None:
        environment = os.environ | {"PYTHONPATH": f"{tree / 'src'}{os.pathsep}{ROOT}"}
        command = [sys.executable, "-c", "from benchmarks.against_revision import serve; serve()"]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def ask(self, what: str, name: str = "", seed: int = 0) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([what, name, seed]) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            # Libraries print when they are imported, too.
            if line.startswith(_ANSWER):
                return json.loads(line.removeprefix(_ANSWER))
        raise RuntimeError(f"a process ended with {self._process.wait()}")

    def end(self) -> None:
        """Have the process end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _row(title: str, pairs: list[tuple[float, float]]) -> str:
    before, now = (statistics.median(values) for values in zip(*pairs, strict=True))
    ratios = sorted(b / a for a, b in pairs)
    return (
        f"| {title} | {before:.3f} | {now:.3f} | {statistics.median(ratios):.3f} | {ratios[0]:.2f}-{ratios[-1]:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", default=BEFORE, help="a revision")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    git = ["git", "-C", str(ROOT)]
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory) / "before"
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(tree), arguments.before], check=True)
        try:
            before, now = _Revision(tree), _Revision(ROOT)
            both = (before, now)
            times, bits = [], []
            for name in _CONFIGURATIONS:
                for revision in both:
                    revision.ask("make", name)
                for what, title in (("step", "a step"), ("project", "a projection")):
                    pairs = [(before.ask(what), now.ask(what)) for _ in range(arguments.repeats)]
                    times.append(_row(f"{name}: {title}", pairs))
                same = [before.ask("bits", name, seed) == now.ask("bits", name, seed) for seed in range(3)]
                bits.append(f"| {name} | {', '.join('same' if s else 'others' for s in same)} |")
            pairs = [(before.ask("selection"), now.ask("selection")) for _ in range(arguments.repeats)]
            times.append(_row(f"selection of {_SELECTED:,}", pairs))
            for revision in both:
                revision.end()
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)
    named = subprocess.run([*git, "rev-parse", "--short", arguments.before], capture_output=True, text=True, check=True)
    lines = [
        "# Updates before and after they could be compiled",
        "",
        f"Revision {named.stdout.strip()}, the last before updates were functions of tensors that an accelerator "
        "compiles and masks were chosen together, against this one, on a CPU. Seconds, medians of "
        f"{arguments.repeats} in turn; the ratio is the median of each pair's, and its range. All weights of "
        f"SmolLM2-135M's shapes, {torch.get_num_threads()} threads; the base optimizer's own step is in it.",
        "",
        "`python -m benchmarks.against_revision` prints and writes this.",
        "",
        "| | before | now | now / before | range |",
        "|---|---|---|---|---|",
        *times,
        "",
        "Small runs of 40 steps, three seeds: are weights and masks at the end the same bits?",
        "",
        "| | seeds 0, 1, 2 |",
        "|---|---|",
        *bits,
    ]
    publish("against_revision", lines)


if __name__ == "__main__":
    main()
