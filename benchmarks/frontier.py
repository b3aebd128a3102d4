"""Perplexity against bytes of weights in memory and tokens a second, for SmolLM2-135M: dense, quantized, pruned, and
pruned and quantized, all in a vLLM server. Writes ``docs/results/frontier.md`` and ``.svg``.

Pruned models are those of ``benchmarks.pruned``, quantized by MaskedGPTQModifier; dense ones by llm-compressor's own.
Needs the environment that ``make serve-test`` builds. Rows are kept in ``benchmarks/results/frontier.jsonl``, so that
``--sparsity`` and ``--scheme`` may name a part at a time.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from llmcompressor.modifiers.gptq import GPTQModifier
from matplotlib import pyplot
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.assets import model_directory
from benchmarks.measuring import LENGTH, ROOT, Results, publish
from benchmarks.pruned import pruned_directory
from benchmarks.quantize_pruned import quantize
from benchmarks.serve_sparse import measure
from elsa_modifier import MaskedGPTQModifier, save_sparse
from elsa_modifier.evaluation import perplexity

NAME = "frontier"
SPARSITIES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95)
SCHEMES = ("bf16", "W8A8", "W8A16", "W4A16")
TITLES = ("C4", "Wikipedia")
GROUP = 64


def _made(sparsity: float, scheme: str, directory: Path) -> dict[str, float]:
    """Write what is served, an ordinary directory, and return the perplexity of each text."""
    source = pruned_directory(sparsity) if sparsity else model_directory()
    if scheme == "bf16":
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        model.save_pretrained(directory)
        model.float()
    else:
        ignore = ["lm_head"]
        modifier = MaskedGPTQModifier(scheme=scheme, ignore=ignore) if sparsity else _dense_modifier(scheme, ignore)
        model = quantize(source, modifier)
        model.save_pretrained(directory, save_compressed=True)
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    return {title: round(perplexity(model, ids), 2) for title, ids in Results(NAME).held_out.items()}


def _dense_modifier(scheme: str, ignore: list[str]) -> GPTQModifier:
    """llm-compressor's own, with groups that divide 576 columns."""
    preset = preset_name_to_scheme(scheme, ["Linear"])
    if preset.weights and preset.weights.group_size:
        preset.weights.group_size = GROUP
    return GPTQModifier(config_groups={"group_0": preset}, ignore=ignore)


def _stored(directory: Path) -> float:
    """MB of the tensors in a directory's files."""
    total = 0
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            total += sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118 (no mapping)
    return total / 1e6


def _row(sparsity: float, scheme: str, root: Path, repeats: int) -> dict[str, Any]:
    dense, sparse = root / "dense", root / "sparse"
    for directory in (dense, sparse):
        shutil.rmtree(directory, ignore_errors=True)
    row: dict[str, Any] = _made(sparsity, scheme, dense)
    stored = _stored(dense)
    served = dense
    if sparsity:
        save_sparse(dense, sparse, encoding="bitmask", progress=False)
        served = sparse
    prompt = torch.randint(10, 4096, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()
    measured, _ = measure(served, root / "server.log", repeats, prompt)
    # What the server keeps compressed, in place of what the files hold of those layers.
    return row | measured | {"weights": round(stored - measured.get("before", 0.0) + measured.get("after", 0.0), 1)}


def _page(rows: dict[tuple[str, float], dict[str, Any]], note: str) -> list[str]:
    dense = rows["bf16", 0.0]
    lines = [
        "# Perplexity, memory and speed together",
        "",
        "`python -m benchmarks.frontier`: SmolLM2-135M in vLLM on a CPU. Weights: all of them in MB as the server",
        "holds them, 57 MB of embeddings in bf16 included. Pruned with 65,536 tokens; more make better models.",
        "A form that another beats in both columns of perplexity, in memory and in both speeds is in brackets.",
        *(["", note] if note else []),
        "",
        "![perplexity against memory and speed](frontier.svg)",
        "",
        "| zeros | values | C4 | Wikipedia | weights, MB | 1 sequence | prompt |",
        "|---|---|---|---|---|---|---|",
    ]
    for (scheme, sparsity), row in sorted(rows.items(), key=lambda item: (item[0][1], SCHEMES.index(item[0][0]))):
        name = "dense" if not sparsity else f"{sparsity:.0%}"
        name = f"({name})" if any(_beats(other, row) for other in rows.values()) else name
        speeds = (f"{row[k]:,.1f} ({row[k] / dense[k]:.2f}x)" for k in ("decode_1", "prefill"))
        cells = [name, scheme, *(f"{row[t]:.1f}" for t in TITLES), f"{row['weights']:.0f}", *speeds]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
    less, more = (*TITLES, "weights"), ("decode_1", "prefill")
    return all(one[k] < other[k] for k in less) and all(one[k] > other[k] for k in more)


def _draw(rows: dict[tuple[str, float], dict[str, Any]]) -> None:
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for scheme, marker in zip(SCHEMES, "os^D", strict=True):
        points = sorted((sparsity, row) for (name, sparsity), row in rows.items() if name == scheme)
        for axis, column in zip(axes, ("weights", "decode_1"), strict=True):
            axis.plot([row[column] for _, row in points], [row["C4"] for _, row in points], marker=marker, label=scheme)
            for sparsity, row in points:
                text = f"{sparsity:.0%}" if sparsity else "dense"
                axis.annotate(text, (row[column], row["C4"]), (3, 3), textcoords="offset points", fontsize=7)
    for axis, title in zip(axes, ("weights in memory, MB", "tokens a second, 1 sequence"), strict=True):
        axis.set(xlabel=title, yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("perplexity, C4")
    axes[0].legend()
    figure.savefig(ROOT / "docs" / "results" / f"{NAME}.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, nargs="+", default=SPARSITIES, help="0 is dense")
    parser.add_argument("--scheme", nargs="+", choices=SCHEMES, default=SCHEMES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--page", action="store_true", help="only write the page from what has been measured")
    parser.add_argument("--note", default="", help="a sentence for the page, on the machine that was measured on")
    arguments = parser.parse_args()
    results = Results(NAME)
    with tempfile.TemporaryDirectory() as temporary:
        for sparsity in () if arguments.page else arguments.sparsity:
            for scheme in arguments.scheme:
                # Pruned weights are multiplied by activations in 16 bits.
                if scheme != "W8A8" or not sparsity:
                    results.record(scheme, sparsity, _row(sparsity, scheme, Path(temporary), arguments.repeats))
    rows = results.latest()
    _draw(rows)
    publish(NAME, _page(rows, arguments.note))


if __name__ == "__main__":
    main()
