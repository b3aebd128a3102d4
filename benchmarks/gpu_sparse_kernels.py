"""Products with compressed weights on a GPU against cuBLAS, by sparsity and number of tokens. Not yet run on a GPU.

Calls are captured in a CUDA graph, so times are the GPU's alone; one that waited for the device could not be captured.
They take weights in turn, more than a cache holds. ``--sizes`` needs no GPU and prints bits a weight.
"""

import argparse
import sys
from collections.abc import Callable

import elsa_kernels  # noqa: F401  registers the operation
import torch
from elsa_kernels.gpu_layout import pack_for_gpu, pack_integers_for_gpu
from torch import Tensor
from torch.nn.functional import linear

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336)]
SPARSITIES = [0.5, 0.7, 0.8, 0.9, 0.95]
TOKENS = [1, 2, 4, 8, 16, 32, 128, 512]
ROUNDS = 20
# Bytes of weights that calls go through in turn: several times the second-level cache of an H100.
UNCACHED = 400 * 10**6
FORMATS = ("bf16", "int8 by row")


def sparse_weight(rows: int, columns: int, sparsity: float) -> Tensor:
    """(rows, columns) bf16 on the CPU, normal where it is not zero, zeros scattered evenly."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(rows, columns, generator=generator)
    return weight.mul_(torch.rand(rows, columns, generator=generator) >= sparsity).bfloat16()


def packed_weight(weight: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Packed, and the dense weight that it stands for, bf16."""
    if form == "bf16":
        return pack_for_gpu(weight), weight
    scales = weight.float().abs().amax(1, keepdim=True) / 127
    integers = (weight / scales).round().to(torch.int8)
    return pack_integers_for_gpu(integers, scales), (integers * scales).bfloat16()


def dense_call(x: Tensor) -> Callable[[Tensor], Tensor]:
    """The product of x and a dense weight."""
    return lambda weight: linear(x, weight)


def compressed_call(x: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """The product of x and a packed weight of that many rows."""
    return lambda packed: torch.ops.elsa_kernels.linear(x, packed, rows)


def seconds(call: Callable[[Tensor], Tensor], weight: Tensor) -> float:
    """GPU time of a call, the best of several rounds."""
    copies = [weight.clone() for _ in range(max(2, UNCACHED // (weight.numel() * weight.element_size())))]
    # Compiles kernels and reserves workspaces, which cannot be captured.
    call(copies[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in copies:
            call(copy)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    best = float("inf")
    for _ in range(ROUNDS):
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        best = min(best, start.elapsed_time(stop) / 1000 / len(copies))
    return best


def check(found: Tensor, expected: Tensor) -> None:
    """Stop where a product is wrong: its time would mean nothing."""
    error = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
    if not error < 0.02:
        sys.exit(f"a product with a compressed weight is off by {error:.3g} of the largest output")


def compare(rows: int, columns: int) -> None:
    """Print the table of a shape."""
    print(f"\n{rows} x {columns}, microseconds of dense bf16, then times that it takes a compressed weight's\n")
    print("| format | sparsity | " + " | ".join(f"{tokens} tokens" for tokens in TOKENS) + " |")
    print("|---" * (len(TOKENS) + 2) + "|")
    inputs = {tokens: torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16) for tokens in TOKENS}
    dense = sparse_weight(rows, columns, 0.0).cuda()
    times = {tokens: seconds(dense_call(x), dense) for tokens, x in inputs.items()}
    print("| dense bf16 | 0% | " + " | ".join(f"{1e6 * times[tokens]:.1f} us" for tokens in TOKENS) + " |")
    for form in FORMATS:
        for sparsity in SPARSITIES:
            packed, stands_for = (part.cuda() for part in packed_weight(sparse_weight(rows, columns, sparsity), form))
            cells = []
            for tokens, x in inputs.items():
                call = compressed_call(x, rows)
                check(call(packed), linear(x, stands_for))
                cells.append(f"{times[tokens] / seconds(call, packed):.2f}")
            print(f"| {form} | {sparsity:.0%} | " + " | ".join(cells) + " |", flush=True)


def print_sizes(rows: int, columns: int) -> None:
    """Bits a weight takes, zeros among them, everything counted; a bitmask's by arithmetic."""
    print("| sparsity | " + " | ".join(FORMATS) + " | a bitmask and bf16 |")
    print("|---" * (len(FORMATS) + 2) + "|")
    for sparsity in SPARSITIES:
        weight = sparse_weight(rows, columns, sparsity)
        bits = [8 * packed_weight(weight, form)[0].numel() / weight.numel() for form in FORMATS]
        bits.append(1 + 16 * int(weight.count_nonzero()) / weight.numel())
        print(f"| {sparsity:.0%} | " + " | ".join(f"{b:.2f}" for b in bits) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", action="store_true", help="bits a weight instead of times; needs no GPU")
    if parser.parse_args().sizes:
        print_sizes(*SHAPES[0])
        return
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu_sparse_kernels needs a CUDA device, and torch finds none; --sizes needs none")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for rows, columns in SHAPES:
        compare(rows, columns)


if __name__ == "__main__":
    main()
