"""Pruned models in a vLLM server, dense and compressed in memory: tokens a second and memory. Writes
``docs/results/serve_sparse.md``. Needs the environment that ``make serve-test`` builds.

Two models: SmolLM2-135M, pruned by ``benchmarks.pruned``, and a stack of LLaMA-7B's
layers with random weights, as many as ``--layers`` says, with a small vocabulary so that the head, which stays dense,
does not hide them. Rows are kept in ``benchmarks/results/serve_sparse.jsonl``, so that ``--models`` and ``--sparsity``
may name a part at a time.
"""

import argparse
import itertools
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.assets import evaluation_sequences, model_directory
from benchmarks.measuring import append_row, publish, read_rows
from benchmarks.pruned import pruned_directory
from benchmarks.random_llama import random_llama
from benchmarks.vllm_server import Server, serve
from elsa_modifier import save_sparse

NAME = "serve_sparse"
SPARSITIES = (0.5, 0.8, 0.9, 0.95)
VOCABULARY = 4096
STACK = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
WEIGHTS = {"dense": "false", "bf16": "true", "int8": '"int8"'}
_MEMORY = re.compile(r"(\d+) of (\d+) linear layers compressed in memory, ([\d,.]+) MB -> ([\d,.]+) MB")
_LONG, _SHORT, _PROMPT, _PREFILL = 48, 8, 16, 512


def small_model(directory: Path, sparsity: float) -> Path:
    """SmolLM2-135M pruned, an ordinary checkpoint directory in bf16."""
    pruned = pruned_directory(sparsity)
    AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(pruned).save_pretrained(directory)
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


@dataclass(frozen=True)
class Answers:
    """What a server says of fixed text: ids that it continues with, and log-probabilities of a prompt's tokens."""

    continued: list[int]
    logprobs: Tensor

    @classmethod
    def of(cls, server: Server, prompt: list[int]) -> "Answers":
        asked = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
        [choice] = server.post("/v1/completions", prompt=prompt[:_PROMPT], max_tokens=_LONG, **asked)["choices"]
        scored = server.post("/v1/completions", prompt=prompt, max_tokens=1, prompt_logprobs=0)["choices"][0]
        found = [at[str(token)]["logprob"] for token, at in zip(prompt[1:], scored["prompt_logprobs"][1:], strict=True)]
        return cls(choice["token_ids"], torch.tensor(found))

    def compared(self, dense: "Answers") -> dict[str, float]:
        """How many tokens it writes as the dense model does, from the first, and the mean and largest difference of
        log-probabilities."""
        pairs = zip(self.continued, dense.continued, strict=True)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        difference = (self.logprobs - dense.logprobs).abs()
        return {"same": same, "mean": round(float(difference.mean()), 4), "most": round(float(difference.max()), 3)}


def measure(
    directory: Path, log: Path, repeats: int, prompt: list[int], *arguments: str, threads: int = 1
) -> tuple[dict[str, Any], Answers]:
    """Serve a directory: speeds, bytes of the linear layers if they are compressed, memory of the server, and what it
    answers."""
    started = time.perf_counter()
    # By itself vLLM takes all cores but one, which it leaves to the process that answers requests.
    cores = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    with serve(directory, log, *arguments, environment=cores) as server:
        row: dict[str, Any] = {"start": round(time.perf_counter() - started, 1)}
        row |= {"loaded": server.resident(), "peak": server.resident("VmHWM")}
        if found := _MEMORY.search(server.log):
            layers, of, before, after = (float(text.replace(",", "")) for text in found.groups())
            row |= {"layers": f"{layers:.0f}/{of:.0f}", "before": before, "after": after}
        return row | _speeds(server, repeats), Answers.of(server, prompt)


def _title(row: dict[str, Any]) -> str:
    threads = row.get("threads", 1)
    return str(row["model"]) + (f", {threads} threads" if threads > 1 else "")


def _page(note: str) -> list[str]:
    latest = {(_title(row), row["sparsity"], row["weights"]): row for row in read_rows(NAME)}
    lines = [
        "# Pruned models in a vLLM server",
        "",
        "`python -m benchmarks.serve_sparse`: vLLM on a CPU, bf16, eager, with one thread if a title does not say",
        "otherwise (`--threads`). In tokens a second:",
        f"{_LONG - _SHORT} tokens decoded by 1 sequence and by 8 together, and a prompt of {_PREFILL}.",
        "All three kinds of weights are the same sparse directory, served with `--model-loader-extra-config "
        '\'{"compressed": false}\'`, `true` or `"int8"`.',
        "",
        "Memory: weights of the linear layers in MB; the process with the weights when it is up, and the most it had",
        "while it loaded, in GB, a KV cache of 1 GB included. Same text: of the tokens that are written for a prompt",
        f"({_LONG}, greedy), how many are those of the dense weights, from the first; and by how much the",
        f"log-probabilities of a prompt's {_PREFILL} tokens differ from theirs, mean and most.",
        *(["", note] if note else []),
    ]
    for model in dict.fromkeys(key[0] for key in latest):
        rows = {key[1:]: row for key, row in latest.items() if key[0] == model}
        lines += [
            "",
            f"## {model}",
            "",
            next(iter(rows.values()))["about"],
            "",
            "| zeros | weights | layers | linears, MB | server, GB | peak, GB | 1 sequence | 8 sequences | prompt "
            "| same text | log-probabilities |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        before = next((row["before"] for row in rows.values() if "before" in row), 0.0)
        for (sparsity, weights), row in sorted(
            rows.items(), key=lambda item: (item[0][0], list(WEIGHTS).index(item[0][1]))
        ):
            after, dense = row.get("after", before), rows[sparsity, "dense"]
            cells = [
                f"{sparsity:.0%}",
                weights,
                row.get("layers", ""),
                f"{after:,.0f} ({before / after:.1f}x less)" if "after" in row else f"{before:,.0f}",
                f"{row['loaded'] / 1e9:.2f}",
                f"{row['peak'] / 1e9:.2f}",
                *(f"{row[k]:,.1f} ({row[k] / dense[k]:.2f}x)" for k in ("decode_1", "decode_8", "prefill")),
                f"{row['same']} / {_LONG}" if "same" in row else "",
                f"{row['mean']:.4f}, {row['most']:.2f}" if "same" in row else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--models", nargs="+", choices=("small", "stack"), default=("small", "stack"))
    parser.add_argument("--layers", type=int, default=16, help="of the stack; 405 MB each if dense")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--weights", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS), help="dense ones first")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--page", action="store_true", help="only write the page from what has been measured")
    parser.add_argument("--note", default="", help="a sentence for the page, on the machine that was measured on")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        generator = torch.Generator().manual_seed(1)
        for model in () if arguments.page else arguments.models:
            make: Callable[[Path, float], Path]
            if model == "small":
                title, make = "SmolLM2-135M", small_model
                tokenizer = AutoTokenizer.from_pretrained(model_directory())
                prompt = evaluation_sequences(tokenizer, sequences=1, length=_PREFILL)["C4"][0].tolist()
                about = "Its tied head of 49,152 x 576 stays dense, 57 MB that every token reads."
            else:
                title, make = "LLaMA-7B's layers", _stack(arguments.layers)
                prompt = torch.randint(10, VOCABULARY, (_PREFILL,), generator=generator).tolist()
                about = f"{arguments.layers} layers, random weights, and a vocabulary of {VOCABULARY:,} (not 32,000)."
            for sparsity in arguments.sparsity:
                sparse = _sparse(make, sparsity, root)
                for threads in arguments.threads:
                    dense = None
                    what = {"model": title, "threads": threads, "sparsity": sparsity, "about": about}
                    for weights in arguments.weights:
                        switch = ("--model-loader-extra-config", f'{{"compressed": {WEIGHTS[weights]}}}')
                        row, answers = measure(
                            sparse, root / "server.log", arguments.repeats, prompt, *switch, threads=threads
                        )
                        if dense is None:
                            dense = answers
                        else:
                            row |= answers.compared(dense)
                        append_row(NAME, what | {"weights": weights} | row)
    publish(NAME, _page(arguments.note))


def _stack(layers: int) -> Callable[[Path, float], Path]:
    def make(directory: Path, sparsity: float) -> Path:
        return random_llama(directory, sparsity, vocabulary=VOCABULARY, num_hidden_layers=layers, **STACK)

    return make


if __name__ == "__main__":
    main()
