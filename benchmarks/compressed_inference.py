"""What weights that stay compressed in memory change: results, memory, and speed on this machine.

SmolLM2-135M-Instruct pruned by magnitude, which takes a moment; what it writes is no measure of a method. bf16 models
are compared with each other and with the same weights in fp32, whose results stand for the exact ones. Writes
``docs/results/compressed_inference.md``.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.assets import model_directory
from benchmarks.magnitude import prune_by_magnitude_
from benchmarks.measuring import publish
from benchmarks.models import SMOLLM2
from elsa_sparse import load_sparse, save_sparse
from elsa_sparse.speed import Comparison, compare_speed, weight_bytes

SPARSITIES = (0.5, 0.7, 0.8, 0.9)
BATCHES = (1, 4, 16)
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a little",
    "To make bread you need flour, water,",
    "The three states of matter are",
    "Photosynthesis is the process by which",
    "def fibonacci(n):",
    "Dear Sir or Madam,",
    "In 1969, the first",
)
NEW_TOKENS = 32


def _pruned(sparsity: float, directory: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(model_directory(), dtype=torch.bfloat16)
    prune_by_magnitude_(model, sparsity)
    save_sparse(model, directory, progress=False)
    return directory


@torch.inference_mode()
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(tokens, vocabulary) of sequences' first halves at once, and of the others one token after the other."""
    half = ids.shape[1] // 2
    output = model(ids[:, :half])
    logits = [output.logits]
    for i in range(half, ids.shape[1]):
        output = model(ids[:, i : i + 1], past_key_values=output.past_key_values)
        logits.append(output.logits)
    return torch.cat(logits, 1).float().flatten(0, 1)


@torch.inference_mode()
def _continued(model: PreTrainedModel) -> list[list[int]]:
    """Each prompt continued greedily, one at a time."""
    tokenizer = AutoTokenizer.from_pretrained(model_directory())
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
        found.append(model.generate(**ids, **options)[0, -NEW_TOKENS:].tolist())
    return found


def _agreement(one: list[list[int]], other: list[list[int]]) -> str:
    """Continuations that are the same, and tokens before the first that is not."""
    same = sum(a == b for a, b in zip(one, other, strict=True))
    until = [next((i for i in range(NEW_TOKENS) if a[i] != b[i]), NEW_TOKENS) for a, b in zip(one, other, strict=True)]
    return f"{same} of {len(one)}, {sum(until) / len(until):.0f} of {NEW_TOKENS}"


def _perplexity(logits: Tensor, ids: Tensor) -> float:
    predicted = logits.view(*ids.shape, -1)[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(predicted, ids[:, 1:].flatten()).exp())


def _results(directory: Path, sparsity: float, ids: Tensor) -> Iterator[str]:
    """Rows of the first table: one of each way to hold the model."""
    exact = load_sparse(directory, dtype=torch.float32)
    truth, text = _logits(exact, ids), None
    del exact
    ways: dict[str, dict[str, Any]] = {"dense, bf16": {}, "compressed, bf16": {"compressed": True}}
    ways |= {"compressed, fp32": {"compressed": True, "dtype": torch.float32}}
    ways |= {"compressed, bf16, int8 head": {"compressed": True, "int8_head": True}}
    for name, options in ways.items():
        model = load_sparse(directory, **options)
        logits = _logits(model, ids)
        error = (logits - truth).abs()
        text = text or _continued(model)
        yield (
            f"| {sparsity:.0%} | {name} | {weight_bytes(model) / 1e6:,.1f} | {error.mean():.2g} | {error.max():.2g} | "
            f"{(logits.argmax(1) == truth.argmax(1)).float().mean():.2%} | {_perplexity(logits, ids):,.2f} | "
            f"{_agreement(_continued(model), text)} |"
        )


def _speeds(measured: Comparison, sparsity: float) -> str:
    cells = [f"{s.dense:,.0f} / {s.compressed:,.0f} ({s.ratio:.2f}x)" for s in measured.speeds]
    return f"| {sparsity:.0%} | {' | '.join(cells)} |"


def _speed_titles(measured: Comparison) -> list[str]:
    batches = [f"batch {batch}" for batch in BATCHES]
    return [
        f"Tokens a second, dense / compressed, bf16, {measured.threads} thread, kernels {measured.backend},",
        f"medians of {measured.rounds} rounds in turns (`elsa bench DIR --threads {measured.threads}`):",
        "",
        f"| zeros | prefill of {measured.prompt} | {' | '.join(batches)} |",
        "|---|---|" + "---|" * len(batches),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="of measuring speed; 0 for none")
    parser.add_argument("--sequences", type=int, default=4, help="of 128 held-out tokens")
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ids = next(iter(SMOLLM2.held_out().values()))[: arguments.sequences, :128].long()
    results: list[str] = []
    speeds: list[str] = []
    for sparsity in arguments.sparsities:
        scratch = Path(tempfile.mkdtemp())
        try:
            directory = _pruned(sparsity, scratch / "sparse")
            for row in _results(directory, sparsity, ids):
                print(row, flush=True)
                results.append(row)
            if arguments.rounds:
                measured = compare_speed(directory, batches=BATCHES, rounds=arguments.rounds, threads=arguments.threads)
                speeds = [*(speeds or _speed_titles(measured)), _speeds(measured, sparsity)]
        finally:
            shutil.rmtree(scratch)
    publish(
        "compressed_inference",
        [
            "# Weights that stay compressed in memory",
            "",
            f"`{' '.join(['python -m benchmarks.compressed_inference', *sys.argv[1:]])}`: SmolLM2-135M-Instruct,",
            "pruned by magnitude. That ruins it at 70% and more: this is about compressed against dense, not about",
            "pruning.",
            "",
            f"Logits of {ids.numel()} held-out tokens, half of each sequence as a prompt and half one by one, against",
            "those of the same weights dense in fp32: mean and largest difference, and how often the likeliest next",
            f"token is the same. Last column: of {len(PROMPTS)} prompts continued greedily for {NEW_TOKENS} tokens,",
            "how many texts are those of the dense bf16 model, and how many tokens are, on average, before the first",
            "other one.",
            "",
            "| zeros | model | MB | mean | largest | same token | perplexity | same text |",
            "|---|---|---|---|---|---|---|---|",
            *results,
            "",
            "Compressed in fp32 is dense in fp32 but for the order of sums. In bf16 both round after every layer, and",
            "are equally far from fp32: neither is the right one, and where two tokens are nearly equally likely they",
            "may choose differently. The int8 head is the one setting here that changes weights.",
            "",
            *speeds,
        ],
    )


if __name__ == "__main__":
    main()
