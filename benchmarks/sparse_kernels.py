"""Sparse weights kept compressed in memory against dense bf16 ones, on this CPU.

Each product of a 4096 x 4096 weight is timed in turn with the others, over enough copies of its weight that none is in
a cache; up to 32 tokens with eight copies in a row, as the layers of a model follow each other. Medians are compared:
with the faster of torch's Linear and, if ``make`` has built the environment for it, vLLM's oneDNN product of a weight
that was reordered beforehand. One thread is timed by its own clock, which stands still while the machine runs something
else; two threads are timed by the wall's.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIZE = 4096
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
VALUES = ("bf16", "int8", "int4")
TOKENS = (1, 2, 4, 8, 16, 32, 128, 512)
THREADS = (1, 2)
IN_A_ROW, FEW_TOKENS = 8, 32
Product = Callable[[int, Tensor], object]
"""Of the copy of the weight with this number, and x."""


def measure(repeats: int) -> None:
    """Print a line of JSON for each thread count, format and sparsity."""
    torch.manual_seed(0)
    from_memory = 1.15 * _last_level_cache()
    dense = _dense_products(from_memory)
    read = torch.ones(1 << 28)
    bandwidths = {}
    for threads in THREADS:
        torch.set_num_threads(threads)
        bandwidths[threads] = read.nbytes / min(_timed(read.sum, threads) for _ in range(5)) / 1e9
    del read
    for values in VALUES:
        for sparsity in SPARSITIES:
            sparse, about = _sparse_product(values, sparsity, from_memory)
            for threads in THREADS:
                torch.set_num_threads(threads)
                times = {str(t): _interleaved(dense | {"sparse": sparse}, t, threads, repeats) for t in TOKENS}
                row = {"threads": threads, "values": values, "sparsity": sparsity, "ms": times}
                print(json.dumps(row | about | {"read": bandwidths[threads]}), flush=True)


def _dense_products(from_memory: float) -> dict[str, Product]:
    weights = _copies(torch.randn(SIZE, SIZE).bfloat16(), from_memory)
    products: dict[str, Product] = {
        "torch": lambda i, x: torch.nn.functional.linear(x, weights[i % len(weights)]),
    }
    try:
        from vllm import _custom_ops as vllm_ops

        handlers = [vllm_ops.create_onednn_mm(weight.t(), 32) for weight in weights]
    except (ImportError, AttributeError, RuntimeError):
        return products
    return products | {"vLLM": lambda i, x: vllm_ops.onednn_mm(handlers[i % len(handlers)], x, None)}


def _sparse_product(values: str, sparsity: float, from_memory: float) -> tuple[Product, dict[str, Any]]:
    import elsa_kernels

    weight = torch.randn(SIZE, SIZE) * 0.02
    threshold = weight.abs().flatten()[: 1 << 20].kthvalue(int((1 << 20) * sparsity)).values
    weight = torch.where(weight.abs() > threshold, weight, 0.0)
    packed = elsa_kernels.pack(weight, values=values)  # type: ignore[arg-type]
    copies = _copies(packed, from_memory)
    operation = torch.ops.elsa_kernels.linear
    about = {
        "layout": elsa_kernels.describe(packed).layout,
        "nbytes": packed.numel(),
        "backend": elsa_kernels.backend(),
    }
    return lambda i, x: operation(x, copies[i % len(copies)], SIZE), about


def _copies(tensor: Tensor, from_memory: float) -> list[Tensor]:
    return [tensor, *(tensor.clone() for _ in range(int(from_memory // tensor.nbytes)))]


def _interleaved(products: dict[str, Product], tokens: int, threads: int, repeats: int) -> dict[str, float]:
    x = torch.randn(tokens, SIZE).bfloat16()
    times: dict[str, list[float]] = {name: [] for name in products}
    copies = IN_A_ROW if tokens <= FEW_TOKENS else 1

    def work(product: Product, turn: int) -> None:
        for i in range(turn * copies, (turn + 1) * copies):
            product(i, x)

    for turn in range(repeats + 1):
        for name, product in products.items():
            times[name].append(_timed(functools.partial(work, product, turn), threads) / copies)
    return {name: statistics.median(seconds[1:]) * 1e3 for name, seconds in times.items()}


def _timed(work: Callable[[], object], threads: int) -> float:
    clock = time.thread_time if threads == 1 else time.perf_counter
    started = clock()
    work()
    return clock() - started


def _last_level_cache() -> int:
    """Bytes; 64 MiB where the system does not tell."""
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max([int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes], default=64 << 20)


def page(rows: list[dict[str, Any]], processor: str, repeats: int) -> list[str]:
    """The Markdown page."""
    dense = [name for name in rows[0]["ms"]["1"] if name != "sparse"]
    compared = "torch's Linear" + (" and vLLM's oneDNN product, whichever is faster" if "vLLM" in dense else "")
    lines = [
        "# Sparse kernels on a CPU",
        "",
        f"{processor}, kernels `{rows[0]['backend']}`. A {SIZE} x {SIZE} weight, random, pruned by magnitude; int8 "
        f"with a scale a row, int4 with one for 128 columns. Cold caches, {repeats} repeats in turn, medians. Under "
        f"tokens is how many times as fast as the dense bf16 product: {compared}. Above 1 is faster.",
        "",
        "`python -m benchmarks.sparse_kernels` prints and writes this.",
    ]
    for threads in THREADS:
        of_threads = [row for row in rows if row["threads"] == threads]
        clock = "one thread's own clock" if threads == 1 else "the wall's clock"
        lines += [
            "",
            f"## {threads} thread{'s' * (threads > 1)} ({clock})",
            "",
            f"torch sums fp32 numbers at {of_threads[0]['read']:.1f} GB/s. GB/s below: packed bytes over the "
            "time of one token.",
            "",
            f"| values | sparsity | layout | bytes a weight | ms, 1 token | GB/s | {_columns('x, {} tok.')} |",
            "|---" * (6 + len(TOKENS)) + "|",
        ]
        for row in of_threads:
            ms = row["ms"]["1"]["sparse"]
            speedups = [min(times[name] for name in dense) / times["sparse"] for times in row["ms"].values()]
            cells = [row["values"], f"{row['sparsity']:.0%}", row["layout"], f"{row['nbytes'] / SIZE**2:.3f}"]
            cells += [f"{ms:.2f}", f"{row['nbytes'] / ms / 1e6:.1f}", *(f"{speedup:.2f}" for speedup in speedups)]
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", f"| dense, ms (median of the rows above) | {_columns('{} tokens')} |"]
        lines.append("|---" * (1 + len(TOKENS)) + "|")
        for name in dense:
            medians = [statistics.median(row["ms"][str(t)][name] for row in of_threads) for t in TOKENS]
            lines.append(f"| {name} | " + " | ".join(f"{median:.2f}" for median in medians) + " |")
    return lines


def _columns(title: str) -> str:
    return " | ".join(title.format(tokens) for tokens in TOKENS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--measure", action="store_true", help="print the measurements instead of the page")
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(arguments.repeats)

    import elsa_kernels

    from benchmarks.measuring import ROOT, publish

    vllm_python = ROOT / ".venv-vllm" / "bin" / "python"
    python = str(vllm_python) if vllm_python.exists() else sys.executable
    with tempfile.TemporaryDirectory() as directory:
        # The other environment borrows the package: it needs nothing but a torch.
        (Path(directory) / "elsa_kernels").symlink_to(Path(elsa_kernels.__file__).parent)
        command = [python, __file__, "--measure", "--repeats", str(arguments.repeats)]
        environment = os.environ | {"PYTHONPATH": directory}
        rows = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as run:
            for line in run.stdout or ():
                print(line, end="", flush=True)
                if line.startswith("{"):
                    rows.append(json.loads(line))
    if run.returncode:
        sys.exit(run.returncode)
    publish("sparse_kernels", page(rows, _processor(), arguments.repeats))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split("\t", 1) for line in lines if "\t" in line)
    name, flags = (fields.get(key, ": unknown").split(":", 1)[1].strip() for key in ("model name", "flags"))
    sets = [flag for flag in ("avx2", "avx512f", "avx512_vbmi2", "avx512_bf16", "amx_bf16") if flag in flags.split()]
    return f"{name} ({', '.join(sets)}), {os.cpu_count()} CPUs"


if __name__ == "__main__":
    main()
