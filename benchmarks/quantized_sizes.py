"""Pruned and quantized SmolLM2-135M: perplexity in transformers and through a vLLM server, and bytes on disk. Writes
``docs/results/quantized_sizes.md``. Needs the environment that ``make serve-test`` builds.

Everything starts from the checkpoints of ``benchmarks.pruned``. Quantized ones are those that
``benchmarks.quantize_pruned`` leaves, or made in the same way on the first run.
"""

import argparse
import math
import tempfile
from pathlib import Path

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.assets import evaluation_sequences, model_directory
from benchmarks.measuring import LENGTH, publish
from benchmarks.pruned import pruned_directory
from benchmarks.quantize_pruned import quantize, quantized_path
from benchmarks.vllm_server import Server, serve
from elsa_modifier import MaskedGPTQModifier, save_sparse
from elsa_modifier.evaluation import perplexity

SCHEMES = ("W4A16", "W8A8")


def quantized_directory(sparsity: float, scheme: str) -> Path:
    """SmolLM2, pruned unless ``sparsity`` is 0, then quantized, as llm-compressor saves it."""
    directory = quantized_path(sparsity, scheme)
    if not directory.exists():
        partial = directory.with_suffix(".partial")
        source = pruned_directory(sparsity) if sparsity else model_directory()
        quantize(source, MaskedGPTQModifier(scheme=scheme, ignore=["lm_head"]), output_dir=str(partial))
        partial.rename(directory)
    return directory


def _bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def served_perplexity(server: Server, sequences: Tensor) -> float:
    """Of (sequences, length) token ids, from the log-probabilities a server gives its prompts."""
    total, count = 0.0, 0
    for sequence in sequences.tolist():
        answer = server.post("/v1/completions", prompt=sequence, max_tokens=1, temperature=0, prompt_logprobs=0)
        positions = answer["choices"][0]["prompt_logprobs"][1:]
        total += sum(p[str(token)]["logprob"] for token, p in zip(sequence[1:], positions, strict=True))
        count += len(positions)
    return math.exp(-total / count)


def _served(directory: Path, held_out: dict[str, Tensor], root: Path) -> dict[str, float]:
    with serve(directory, root / "server.log") as server:
        return {title: served_perplexity(server, ids) for title, ids in held_out.items()}


def _cell(values: dict[str, float]) -> str:
    return " / ".join(f"{value:,.1f}" for value in values.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, nargs="+", default=(0.5, 0.8, 0.9))
    parser.add_argument("--served", type=float, nargs="*", default=(0.8,), help="sparsities to serve")
    arguments = parser.parse_args()
    held_out = evaluation_sequences(AutoTokenizer.from_pretrained(model_directory()), length=LENGTH)
    sizes, served = [], []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        dense = _bytes(model_directory())
        for scheme in SCHEMES:
            for sparsity in (0.0, *arguments.sparsity):
                directory = quantized_directory(sparsity, scheme)
                sparse = root / directory.name
                save_sparse(directory, sparse, progress=False)
                row = [_bytes(directory), _bytes(sparse)]
                cells = [f"{size / 1e6:.1f} ({dense / size:.2f}x)" for size in row]
                sizes.append(f"| {scheme} | {sparsity:.0%} | " + " | ".join(cells) + " |")
                print(sizes[-1], flush=True)
                if sparsity in arguments.served:
                    model = AutoModelForCausalLM.from_pretrained(directory)
                    ours = {title: perplexity(model, ids) for title, ids in held_out.items()}
                    through = {
                        "as saved": _served(directory, held_out, root),
                        "sparse": _served(sparse, held_out, root),
                    }
                    worst = max(abs(values[t] / ours[t] - 1) for values in through.values() for t in ours)
                    served.append(
                        f"| {scheme} | {sparsity:.0%} | {_cell(ours)} | {_cell(through['as saved'])} "
                        f"| {_cell(through['sparse'])} | {worst:.2%} |"
                    )
                    print(served[-1], flush=True)
    publish(
        "quantized_sizes",
        [
            "# Pruned, quantized, stored and served",
            "",
            "`python -m benchmarks.quantized_sizes`: SmolLM2-135M pruned by ELSA, then MaskedGPTQModifier.",
            "",
            f"Megabytes of all weights, embeddings included (times smaller than {dense / 1e6:.1f}, dense bf16):",
            "",
            "| scheme | sparsity | as llm-compressor saves it | in the sparse format |",
            "|---|---|---|---|",
            *sizes,
            "",
            "Perplexity on held-out C4 / Wikipedia, in transformers and through a vLLM server:",
            "",
            "| scheme | sparsity | transformers | vLLM, as saved | vLLM, sparse | largest difference |",
            "|---|---|---|---|---|---|",
            *served,
        ],
    )


if __name__ == "__main__":
    main()
