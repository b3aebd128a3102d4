"""What training checkpoints cost on a CPU, by their size: how long a run waits for one, and how long it takes to read.

Llamas of random weights, with fp32 Adam, and a checkpoint after each of a few short steps. Seconds of the processor are
what this process has computed; the rest of the time is the disk's, or that of others on the machine. In another thread,
from a copy, as with weights on an accelerator, a checkpoint takes the time of the cores that train.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.measuring import publish
from benchmarks.ranks import save_tokenizer
from elsa_modifier import ELSAModifier
from elsa_modifier.resuming.checkpoints import TrainingCheckpoints
from elsa_modifier.resuming.directory import complete_checkpoints
from elsa_modifier.resuming.manifest import read_verified

STEPS = 6
# Width and layers.
SHAPES = ((256, 4), (512, 8), (768, 12))
_MODES = {"before the next step": False, "in a thread, from a copy": True}


class _Timed(TrainingCheckpoints):
    """Notes what each step's end has cost, in seconds and in seconds of the processor."""

    in_thread = False
    waited: list[tuple[float, float]]

    def after_step(self, step: int, catch_up: Any) -> None:
        type(self).waited.append(_timed(lambda: super(_Timed, self).after_step(step, catch_up)))

    def _can_copy(self, tensors: Any) -> bool:
        return type(self).in_thread


def _timed(action: Callable[[], Any]) -> tuple[float, float]:
    began, computed = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - began, time.process_time() - computed


def measure(config: LlamaConfig, mode: str, directory: Path) -> list[str]:
    """Cells of a row: sizes, what a run waits, what reading takes."""
    _Timed.waited, _Timed.in_thread = [], _MODES[mode]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    size = sum(p.numel() for p in model.parameters())
    save_tokenizer(directory)
    config.save_pretrained(directory)
    model.config._name_or_path = str(directory)
    modifier = ELSAModifier(
        sparsity=0.8,
        steps=STEPS,
        batch_size=1,
        sequence_length=64,
        lr=1e-5,
        objective="next_token",
        precision="fp32",
        checkpoint_every={"steps": 1},
        checkpoint_dir=str(directory / "checkpoints"),
    )
    words = Dataset.from_dict({"input_ids": torch.randint(1, 512, (STEPS, 64)).tolist()})
    with patch("elsa_modifier.resuming.session.TrainingCheckpoints", _Timed):
        oneshot(model=model, tokenizer=str(directory), dataset=words, recipe=[modifier])
    # Not the last step, whose checkpoint is always waited for, nor the first, before which there was none to wait for.
    waited, computed = zip(*_Timed.waited[1:-1], strict=True)
    last = complete_checkpoints(directory / "checkpoints")[0]
    bytes_written = sum(file.stat().st_size for file in last.iterdir())
    reading = _timed(lambda: read_verified(last))
    values = [statistics.median(waited), statistics.median(computed), *reading]
    return [f"{size / 1e6:.0f}M", f"{bytes_written / 1e6:,.0f}", mode, *(f"{value:.2f}" for value in values)]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    lines = [
        "# What a training checkpoint takes",
        "",
        f"`python -m benchmarks.checkpoint_time`: Llamas of random weights, fp32 Adam, {os.cpu_count()} CPU cores, a "
        f"checkpoint after each of {STEPS} steps; medians. Waited: how long the run stands still for one. Seconds of "
        "the processor, for checksums and copies, are in brackets; the rest is the disk's, or that of other processes.",
        "",
        "| parameters | MB | written | s waited | s to read and verify |",
        "|---" * 5 + "|",
    ]
    for width, layers in SHAPES:
        config = LlamaConfig(
            vocab_size=4096,
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
        for mode in _MODES:
            with tempfile.TemporaryDirectory(prefix="elsa-time-") as made:
                size, count, how, waited, computed, read, verified = measure(config, mode, Path(made))
            lines.append(f"| {size} | {count} | {how} | {waited} ({computed}) | {read} ({verified}) |")
            print(lines[-1], flush=True)
    publish("checkpoint_time", lines)


if __name__ == "__main__":
    main()
