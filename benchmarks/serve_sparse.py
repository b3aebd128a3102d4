"""Pruned models in a vLLM server, dense and compressed in memory: tokens a second and memory. Writes
``docs/results/serve_sparse.md``. Needs the environment that ``make serve-test`` builds.

Two models: SmolLM2-135M, pruned by magnitude (speed and memory do not depend on which weights are zero; nobody should
read its text), and a stack of LLaMA-7B's layers with random weights, as many as ``--layers`` says, with a small
vocabulary so that the head, which stays dense, does not hide them. Rows are kept in
``benchmarks/results/serve_sparse.jsonl``, so that ``--models`` and ``--sparsity`` may name a part at a time.
"""

import argparse
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.assets import model_directory
from benchmarks.magnitude import prune_by_magnitude_
from benchmarks.measuring import append_row, publish, read_rows
from benchmarks.random_llama import random_llama
from benchmarks.vllm_server import Server, serve
from elsa_modifier import save_sparse

NAME = "serve_sparse"
SPARSITIES = (0.5, 0.8, 0.9, 0.95)
VOCABULARY = 4096
STACK = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
DENSE = ("--model-loader-extra-config", '{"compressed": false}')
_MEMORY = re.compile(r"(\d+) of (\d+) linear layers compressed in memory, ([\d,.]+) MB -> ([\d,.]+) MB")
_LONG, _SHORT, _PROMPT, _PREFILL = 48, 8, 16, 512


def small_model(directory: Path, sparsity: float) -> Path:
    """SmolLM2-135M pruned by magnitude, an ordinary checkpoint directory."""
    model = AutoModelForCausalLM.from_pretrained(model_directory(), dtype=torch.bfloat16)
    prune_by_magnitude_(model, sparsity)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(model_directory()).save_pretrained(directory)
    return directory


def _sparse(make: Callable[[Path, float], Path], sparsity: float, root: Path) -> Path:
    """A model's sparse directory, made anew; bitmasks, which are the fastest to write and read."""
    dense, sparse = root / "dense", root / "sparse"
    for directory in (dense, sparse):
        shutil.rmtree(directory, ignore_errors=True)
    save_sparse(make(dense, sparsity), sparse, encoding="bitmask", progress=False)
    shutil.rmtree(dense)
    return sparse


def _seconds(server: Server, prompts: list[list[int]], tokens: int) -> float:
    started = time.perf_counter()
    server.post("/v1/completions", prompt=prompts, max_tokens=tokens, temperature=0, ignore_eos=True)
    return time.perf_counter() - started


def _speeds(server: Server, repeats: int) -> dict[str, float]:
    """Tokens a second: decoded for 1 and for 8 sequences together, and of a prompt. The best of some repeats each."""
    generator = torch.Generator().manual_seed(0)

    def prompts(count: int, length: int) -> list[list[int]]:
        return torch.randint(10, VOCABULARY, (count, length), generator=generator).tolist()

    result = {}
    for count in (1, 8):
        same = prompts(count, _PROMPT)
        _seconds(server, same, _SHORT)
        # What the prompt and the request cost is in both.
        short = min(_seconds(server, same, _SHORT) for _ in range(repeats))
        long = min(_seconds(server, same, _LONG) for _ in range(repeats))
        result[f"decode_{count}"] = round(count * (_LONG - _SHORT) / (long - short), 2)
    # Others each time, since the server remembers.
    result["prefill"] = round(_PREFILL / min(_seconds(server, prompts(1, _PREFILL), 1) for _ in range(repeats)), 1)
    return result


def measure(directory: Path, log: Path, repeats: int, *arguments: str) -> dict[str, Any]:
    """Serve a directory: speeds, bytes of the linear layers if they are compressed, memory of the server."""
    started = time.perf_counter()
    with serve(directory, log, *arguments) as server:
        row: dict[str, Any] = {"start": round(time.perf_counter() - started, 1)}
        row |= {"loaded": server.resident(), "peak": server.resident("VmHWM")}
        if found := _MEMORY.search(server.log):
            layers, of, before, after = (float(text.replace(",", "")) for text in found.groups())
            row |= {"layers": f"{layers:.0f}/{of:.0f}", "before": before, "after": after}
        return row | _speeds(server, repeats)


def _page(note: str) -> list[str]:
    latest = {(row["model"], row["sparsity"], row["weights"]): row for row in read_rows(NAME)}
    lines = [
        "# Pruned models in a vLLM server",
        "",
        "`python -m benchmarks.serve_sparse`: vLLM on a CPU, bf16, eager, with as many threads as it chooses",
        "(one where there are two cores). In tokens a second:",
        f"{_LONG - _SHORT} tokens decoded by 1 sequence and by 8 together, and a prompt of {_PREFILL}.",
        "Dense is the same sparse directory served with `--model-loader-extra-config '{\"compressed\": false}'`.",
        "",
        "Memory: weights of the linear layers in MB; the process with the weights when it is up, and the most it had",
        "while it loaded, in GB, a KV cache of 1 GB included.",
        *(["", note] if note else []),
    ]
    for model in dict.fromkeys(key[0] for key in latest):
        rows = {key[1:]: row for key, row in latest.items() if key[0] == model}
        dense = next(row for (_, weights), row in rows.items() if weights == "dense")
        lines += [
            "",
            f"## {model}",
            "",
            dense["about"],
            "",
            "| zeros | weights | layers | linears, MB | server, GB | peak, GB | 1 sequence | 8 sequences | prompt |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        before = next((row["before"] for row in rows.values() if "before" in row), 0.0)
        for (sparsity, weights), row in sorted(rows.items(), key=lambda item: (item[0][1] != "dense", item[0])):
            after = row.get("after", before)
            cells = [
                f"{sparsity:.0%}" if weights != "dense" else "any",
                weights,
                row.get("layers", ""),
                f"{after:,.0f} ({before / after:.1f}x less)" if "after" in row else f"{before:,.0f}",
                f"{row['loaded'] / 1e9:.2f}",
                f"{row['peak'] / 1e9:.2f}",
                *(f"{row[k]:,.1f} ({row[k] / dense[k]:.1f}x)" for k in ("decode_1", "decode_8", "prefill")),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--models", nargs="+", choices=("small", "stack"), default=("small", "stack"))
    parser.add_argument("--layers", type=int, default=16, help="of the stack; 405 MB each if dense")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--page", action="store_true", help="only write the page from what has been measured")
    parser.add_argument("--note", default="", help="a sentence for the page, on the machine that was measured on")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for model in () if arguments.page else arguments.models:
            make: Callable[[Path, float], Path]
            if model == "small":
                title, make = "SmolLM2-135M", small_model
                about = "Pruned by magnitude. Its tied head of 49,152 x 576 stays dense, 57 MB that every token reads."
            else:
                title, make = "LLaMA-7B's layers", _stack(arguments.layers)
                about = f"{arguments.layers} layers, random weights, and a vocabulary of {VOCABULARY:,} (not 32,000)."
            for index, sparsity in enumerate(arguments.sparsity):
                sparse = _sparse(make, sparsity, root)
                for weights in ("compressed", "dense") if index == 0 else ("compressed",):
                    switch = DENSE if weights == "dense" else ()
                    row = measure(sparse, root / "server.log", arguments.repeats, *switch)
                    append_row(NAME, {"model": title, "sparsity": sparsity, "weights": weights, "about": about} | row)
    publish(NAME, _page(arguments.note))


def _stack(layers: int) -> Callable[[Path, float], Path]:
    def make(directory: Path, sparsity: float) -> Path:
        return random_llama(directory, sparsity, vocabulary=VOCABULARY, num_hidden_layers=layers, **STACK)

    return make


if __name__ == "__main__":
    main()
