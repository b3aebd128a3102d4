"""One process against several: the same recipe, global batch and seed. Writes ``docs/results/ranks.md``.

A small Llama is first trained on sequences of a language of its own, in which two words decide the next in four of five
cases, and is then pruned: in one process; in 2 that each hold the model; and in 2 and 4 that each hold a part. Ranks
are CPU processes joined by gloo, all on one machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from benchmarks.measuring import MALLOC, publish, resident
from elsa_modifier import ELSAModifier
from elsa_modifier.admm.optimizer import ADMMOptimizer
from elsa_modifier.evaluation import perplexity
from elsa_modifier.planning import Planner
from elsa_modifier.training.loading import load_for_ranks

WORDS, LENGTH, STEPS, DENSE_STEPS = 512, 64, 16, 120
CONFIG = LlamaConfig(
    vocab_size=WORDS,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
    max_position_embeddings=LENGTH,
    tie_word_embeddings=False,
)
FIELDS: dict[str, Any] = dict(
    sparsity=0.8, steps=STEPS, batch_size=8, sequence_length=LENGTH, interval=4, lr=1e-3, precision="fp32"
)
RECIPES: dict[str, dict[str, Any]] = {
    "fp32, distillation, shared budget": {},
    "fp32, next token, sparsity of each weight": {"objective": "next_token", "shared_budget": False},
    "fp32, distillation, 2:4": {"sparsity": None, "mask_structure": "2:4"},
    "ELSA-L (bf16, adam8bit_sr, int8), distillation, shared budget": {
        "precision": "bf16",
        "weight_dtype": "bf16",
        "optimizer": "adam8bit_sr",
        "state_dtype": "int8",
        "penalty": {"value": 0.3, "dual": True},
    },
}
ELSA_L = list(RECIPES)[-1]
LAYOUTS = {"2, each with all": (2, "ddp"), "2, each with a part": (2, "fsdp"), "4, each with a part": (4, "fsdp")}


def language(sequences: int, seed: int) -> Tensor:
    """(sequences, LENGTH) words; two decide the next, in four of five cases."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, WORDS, (sequences, LENGTH), generator=generator)
    surprise = torch.rand(words.shape, generator=generator) < 0.2
    for i in range(2, LENGTH):
        known = 1 + (words[:, i - 1] * 7 + words[:, i - 2] // 128) % (WORDS - 1)
        words[:, i] = torch.where(surprise[:, i], words[:, i], known)
    return words


def train_dense(directory: Path) -> None:
    """What is pruned later: a Llama that has learned part of the language."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    words = language(8 * DENSE_STEPS, seed=1)
    for step, batch in enumerate(words.split(8)):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1.0, (step + 1) / 20) * (1 - step / DENSE_STEPS)
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    save_tokenizer(directory)


def save_tokenizer(directory: Path) -> None:
    """One token a word, of which there are WORDS."""
    vocabulary = {"<eos>": 0, "<unk>": WORDS} | {f"w{i}": i for i in range(1, WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>").save_pretrained(directory)


def prune_all(directory: Path, result: Path, jobs: list[tuple[str, dict[str, Any]]]) -> None:
    """In this process, one of several or the only one: prune, and save what it came to and what it took.

    :param jobs: recipes by name, and fields that replace theirs
    """
    torch.set_num_threads(1)
    found = [prune(directory, recipe, **others) for recipe, others in jobs]
    torch.save(found, f"{result}.{os.environ.get('RANK', '0')}")


def prune(directory: Path, recipe: str, **others: Any) -> dict[str, Any]:
    """With one recipe: on the first rank weights, masks, perplexity, and on each the bytes that were held."""
    parallel = others.get("parallel", "fsdp")
    model = (AutoModelForCausalLM.from_pretrained if parallel == "ddp" else load_for_ranks)(directory)
    before = resident("VmRSS")
    held: dict[str, int] = {}
    step = ADMMOptimizer.step

    def measuring(self: ADMMOptimizer, ok: torch.Tensor | None = None) -> None:
        gradients = sum(t.nbytes for t in _gradients(self))
        step(self, ok)
        held.update(
            weights=sum(p.nbytes for group in self.base.param_groups for p in group["params"]),
            gradients=gradients,
            optimizer=sum(t.nbytes for t in _tensors(list(self.base.state.values()))),
            admm=self.state_nbytes + sum(t.nbytes for t in _tensors([vars(self._scratch)] if self._scratch else [])),
        )

    ADMMOptimizer.step = measuring  # type: ignore[method-assign]
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts anew
    modifier = ELSAModifier(**(FIELDS | RECIPES[recipe] | others))
    words = Dataset.from_dict({"input_ids": language(8 * STEPS, seed=2).tolist()})
    model = oneshot(model=model, tokenizer=str(directory), dataset=words, recipe=[modifier])
    peak = resident("VmHWM") - before
    ADMMOptimizer.step = step  # type: ignore[method-assign]
    found: dict[str, Any] = {"held": held, "peak": peak}
    if os.environ.get("RANK", "0") == "0":
        found |= {
            "weights": {name: p.detach() for name, p in model.named_parameters()},
            "masks": modifier.masks,
            "perplexity": perplexity(model, language(64, seed=3)),
        }
    return found


def _gradients(optimizer: ADMMOptimizer) -> Iterator[Tensor]:
    return (p.grad for group in optimizer.base.param_groups for p in group["params"] if p.grad is not None)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "codes"):  # a moment in 8 bits
        yield from (value.codes, value.scale)


def _run(directory: Path, count: int, jobs: list[tuple[str, dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """What each rank has found of each job."""
    result = directory / "result"
    command = [sys.executable]
    if count > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command += ["-m", "benchmarks.ranks", "--prune", str(directory), str(result), json.dumps(jobs)]
    subprocess.run(command, env=os.environ | MALLOC | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    by_rank = [torch.load(f"{result}.{rank}") for rank in range(count)]
    return [list(of_job) for of_job in zip(*by_rank, strict=True)]


def _compared(found: dict[str, Any], one: dict[str, Any]) -> list[str]:
    bits = sum(int((found["masks"][name] != mask).sum()) for name, mask in one["masks"].items())
    all_bits = sum(mask.numel() for mask in one["masks"].values())
    ours, theirs = (torch.cat([w.flatten().double() for w in of["weights"].values()]) for of in (found, one))
    difference = float((ours - theirs).norm() / theirs.norm())
    return [f"{bits:,} of {all_bits:,}", f"{difference:.1e}", f"{found['perplexity']:.4f}"]


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prune", nargs=3, help="Prune in this process: directory, result, recipes.")
    arguments = parser.parse_args()
    if arguments.prune:
        directory, result, jobs = arguments.prune
        prune_all(Path(directory), Path(result), json.loads(jobs))
        return
    same, memory = [], []
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        train_dense(directory)
        dense = perplexity(AutoModelForCausalLM.from_pretrained(directory), language(64, seed=3))
        in_parts = [(ELSA_L, {"batch_size": 8 // n, "gradient_accumulation_steps": n}) for n in (2, 4)]
        *alone, halves, quarters = _run(directory, 1, [*((recipe, {}) for recipe in RECIPES), *in_parts])
        spread = {
            layout: _run(directory, count, [(recipe, {"parallel": parallel}) for recipe in RECIPES])
            for layout, (count, parallel) in LAYOUTS.items()
        }
    for number, recipe in enumerate(RECIPES):
        one = alone[number]
        same.append(f"| {recipe} | 1 | | | {one[0]['perplexity']:.4f} |")
        memory += _memory(recipe, recipe, "1", 1, one)
        for title, parts in (("1, 2 micro-batches", halves), ("1, 4 micro-batches", quarters)):
            if recipe == ELSA_L:
                same.append(f"| | {title} | {' | '.join(_compared(parts[0], one[0]))} |")
        for layout, (count, parallel) in LAYOUTS.items():
            found = spread[layout][number]
            same.append(f"| | {layout} | {' | '.join(_compared(found[0], one[0]))} |")
            memory += _memory(recipe, "", layout, count if parallel == "fsdp" else 1, found)
            if recipe == ELSA_L:
                parts = halves if count == 2 else quarters
                against = " | ".join(_compared(found[0], parts[0]))
                same.append(f"| | the same, against 1, {count} micro-batches | {against} |")
    publish(
        "ranks",
        [
            "# One process against several",
            "",
            f"A Llama of {sum(p.numel() for p in AutoModelForCausalLM.from_config(CONFIG).parameters()):,} parameters, "
            f"trained on a made-up language (perplexity {dense:.4f}), pruned in {STEPS} steps with the same global "
            "batch and seed. Ranks are CPU processes joined by gloo on one machine; none of this has run on GPUs.",
            "",
            "`python -m benchmarks.ranks` prints and writes this.",
            "",
            "## What comes out",
            "",
            "Bits of the masks that differ from those of one process, relative difference of all weights together, and "
            "perplexity.",
            "",
            "| recipe | ranks | bits that differ | weights | perplexity |",
            "|---" * 5 + "|",
            *same,
            "",
            "In fp32 ranks differ from one process as its own sums in another order would: a bit differs where two "
            "scores are equal up to that, and a few more follow, as a weight that is pulled moves all gradients; "
            "weights then differ by those that one of the masks has and the other has not. In bf16 a gradient is "
            "rounded as soon as it is found. So a batch that is divided, by ranks or into micro-batches, gives "
            "slightly other gradients, and stochastic rounding, whose noise is the same, takes some weights to their "
            "other neighbour. It is the division that matters, not the ranks, as the lines with micro-batches show.",
            "",
            "## Memory",
            "",
            "Megabytes of the fullest rank. Held: tensors between two steps (weights, gradients, moments, ADMM state), "
            "and what `elsa plan` says of the same four for as many GPUs. Peak: resident memory in the run less that "
            "before it, with a teacher, activations, whole layers and all. The model itself was loaded before, by the "
            "first rank alone (`load_for_ranks`) where each has a part.",
            "",
            "| recipe | ranks | weights | gradients | moments | ADMM | held | planned | peak |",
            "|---" * 9 + "|",
            *memory,
        ],
    )


def _memory(recipe: str, title: str, layout: str, parts: int, found: list[dict[str, Any]]) -> list[str]:
    fullest = max(found, key=lambda of: sum(of["held"].values()))["held"]
    planner = Planner(CONFIG, gpus=parts, capacity=0, tflops=1.0, device="cpu")
    plan = planner.plan(ELSAModifier(**(FIELDS | RECIPES[recipe]))).memory
    planned = plan.weights + plan.gradients + plan.optimizer + plan.admm_state
    cells = [fullest[key] for key in ("weights", "gradients", "optimizer", "admm")]
    cells += [sum(fullest.values()), planned, max(of["peak"] for of in found)]
    return [f"| {title} | {layout} | {' | '.join(map(_megabytes, cells))} |"]


if __name__ == "__main__":
    main()
