"""Pruning runs that are ended by SIGKILL at random moments and started again: are the final weights the same bits?

Tiny random models, on a CPU, with one thread: where a run is cut off does not depend on its size. Each run is started
again until it ends by itself, and killed up to four times on the way: half of the times at a moment drawn from the time
that a whole run takes, half of them as soon as a checkpoint is being written.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig, PreTrainedTokenizerFast

from benchmarks.measuring import append_row, publish, read_rows
from elsa_modifier import ELSAModifier
from elsa_modifier.resuming.directory import complete_checkpoints
from elsa_modifier.resuming.manifest import read_verified

STEPS = 24
FIELDS: dict[str, Any] = dict(
    sparsity=0.8, steps=STEPS, batch_size=2, sequence_length=32, interval=3, lr=1e-3, checkpoint_every={"steps": 2}
)
_SHAPE: dict[str, Any] = dict(
    vocab_size=96,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
VARIANTS: dict[str, tuple[PretrainedConfig, dict[str, Any]]] = {
    "Adam in fp32": (LlamaConfig(**_SHAPE, intermediate_size=384), {}),
    "bf16 weights, moments in 8 bits, stochastic rounding": (
        LlamaConfig(**_SHAPE, intermediate_size=384),
        {"optimizer": "adam8bit_sr", "weight_dtype": "bf16"},
    ),
    "dropout, coupled penalty, state in 8 bits": (
        OPTConfig(**_SHAPE, ffn_dim=384, word_embed_proj_dim=128, dropout=0.1),
        {"penalty": {"form": "coupled", "value": 1e-2}, "state_dtype": "int8", "optimizer": "adamw"},
    ),
}
# A new process for every start, but none that has to import everything anew.
_fork = multiprocessing.get_context("fork")


def prepare(directory: Path) -> None:
    """A model and a tokenizer of each variant."""
    words = {"<eos>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(94)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", model_max_length=64
    )
    for number, (config, _) in enumerate(VARIANTS.values()):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory / str(number))
        tokenizer.save_pretrained(directory / str(number))


def prune(directory: Path, number: int, out: str, fields: dict[str, Any]) -> None:
    """One start: a variant's whole run, or what is left of it."""
    torch.set_num_threads(1)
    os.dup2(os.open(directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    first = random.Random(0)
    texts = [" ".join(f"w{(first.randrange(94) + 7 * i) % 94}" for i in range(40)) for _ in range(64)]
    oneshot(
        model=str(directory / str(number)),
        dataset=Dataset.from_dict({"text": texts}),
        recipe=[ELSAModifier(**FIELDS | fields)],
        output_dir=str(directory / out),
    )


def started(directory: Path, number: int, out: str, fields: dict[str, Any]) -> Any:
    process = _fork.Process(target=prune, args=(directory, number, out, fields))
    process.start()
    return process


def reference(directory: Path, number: int) -> float:
    """Run a variant without interruption; the seconds that it took."""
    began = time.monotonic()
    process = started(directory, number, f"reference-{number}", list(VARIANTS.values())[number][1])
    _wait(process, directory)
    return time.monotonic() - began


def kill_and_resume(directory: Path, number: int, seed: int, seconds: float) -> dict[str, Any]:
    """One run, killed at moments drawn from the seed, and what came out of it."""
    drawn = random.Random(seed)
    out = f"run-{seed}"
    training = directory / f"{out}-training"
    fields = list(VARIANTS.values())[number][1]
    wanted, kills = drawn.randint(1, 4), Counter[str]()
    starts, resumed_from = 0, []
    while True:
        found = complete_checkpoints(training)
        resumed_from.append(int(found[0].name.removeprefix("step-")) if found else 0)
        process = started(directory, number, out, fields)
        starts += 1
        if kills.total() < wanted:
            if drawn.random() < 0.5:
                process.join(drawn.uniform(0, seconds))
            else:
                step = drawn.randrange(min(resumed_from[-1] + 2, STEPS), STEPS + 1, 2)
                while process.is_alive() and not _being_written(training, step):
                    time.sleep(0.0005)
                time.sleep(drawn.uniform(0, 0.02))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                kills[_moment(training)] += 1
                for checkpoint in complete_checkpoints(training):
                    read_verified(checkpoint)
                continue
        _wait(process, directory)
        break
    return {
        "variant": list(VARIANTS)[number],
        "seed": seed,
        "starts": starts,
        "resumed_from": resumed_from,
        "kills": dict(kills),
        "same_weights": _same_weights(directory / out, directory / f"reference-{number}"),
        "same_history": _history(directory / out) == _history(directory / f"reference-{number}"),
        "left_over": [path.name for path in training.iterdir() if path.name.startswith(".")],
    }


def _wait(process: Any, directory: Path) -> None:
    process.join()
    if process.exitcode:
        raise RuntimeError(f"a start ended with status {process.exitcode}: {(directory / 'log').read_text()[-4000:]}")


def _being_written(training: Path, step: int) -> bool:
    """Whether a checkpoint of this step or a later one is."""
    return any(int(path.name.rpartition("-")[2]) >= step for path in training.glob(".partial-*"))


def _moment(training: Path) -> str:
    if any(training.glob(".partial-*")):
        return "while a checkpoint was written"
    return "after a checkpoint" if complete_checkpoints(training) else "before the first checkpoint"


def _same_weights(a: Path, b: Path) -> bool:
    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return first.keys() == second.keys() and all(
        torch.equal(first[n].view(torch.uint8), second[n].view(torch.uint8)) for n in first
    )


def _history(directory: Path) -> list[dict[str, Any]]:
    steps = json.loads((directory / "elsa_history.json").read_text())["steps"]
    return [{key: value for key, value in step.items() if key != "seconds"} for step in steps]


def page() -> None:
    """Write the page from all rows, the last one of a seed counting."""
    rows = list({row["seed"]: row for row in read_rows("kill_and_resume")}.values())
    kills: Counter[str] = sum((Counter(row["kills"]) for row in rows), Counter())
    lines = [
        "# Killed and resumed",
        "",
        f"`python -m benchmarks.kill_and_resume`: {len(rows)} pruning runs of {STEPS} steps, with a training "
        "checkpoint every 2 steps, ended by SIGKILL at random moments and started again until they ended by "
        "themselves. Tiny random models, on a CPU, with one thread.",
        "",
        f"Final weights the same bits as those of a run that nothing had cut off: **{_count(rows, 'same_weights')} of "
        f"{len(rows)}**. Histories (loss, gradient norm, residual of every step) the same: "
        f"{_count(rows, 'same_history')} of {len(rows)}. After each kill every checkpoint with a final name had the "
        "checksums that it was written with.",
        "",
        f"{kills.total()} kills: " + ", ".join(f"{count} {moment}" for moment, count in sorted(kills.items())) + ".",
        "",
        "| run | starts | kills | went on after steps | same weights |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['variant']} | {row['starts']} | {sum(row['kills'].values())} | "
        f"{', '.join(map(str, row['resumed_from']))} | {'yes' if row['same_weights'] else '**no**'} |"
        for row in rows
    ]
    publish("kill_and_resume", lines)


def _count(rows: list[dict[str, Any]], field: str) -> int:
    return sum(bool(row[field]) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--check", action="store_true", help="print rows, and write neither them nor the page")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        prepare(directory)
        seconds = [reference(directory, number) for number in range(min(options.runs, len(VARIANTS)))]
        for seed in range(options.runs):
            number = seed % len(VARIANTS)
            row = kill_and_resume(directory, number, seed, seconds[number])
            if options.check:
                print(json.dumps(row), flush=True)
            else:
                append_row("kill_and_resume", row)
    if not options.check:
        page()


if __name__ == "__main__":
    main()
