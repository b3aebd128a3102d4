"""``elsa plan`` against measurement: planned bytes and the peak of a process that really trains, for three models.

Each model is trained for a few steps, by ELSAModifier's own code, in a process of its own. What is measured is that
process's peak resident memory in the run (``VmHWM``) less what was resident just before the model was built. glibc is
told to return blocks to the kernel as soon as they are freed, so that resident memory follows live tensors.
"""

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, OPTConfig, PreTrainedConfig, get_scheduler

from benchmarks.measuring import publish
from elsa_modifier import ELSAModifier
from elsa_modifier.planning import Planner
from elsa_modifier.training.data import PackedBatches
from elsa_modifier.training.loop import train
from elsa_modifier.training.model_state import trainable

STEPS = 3
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}

# What each row varies: depth against width, vocabulary, kind of attention and of norm, tied or not; and the recipe.
CASES: dict[str, tuple[PreTrainedConfig, dict[str, Any]]] = {
    "Llama, large vocabulary": (
        LlamaConfig(
            vocab_size=64000,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        ),
        {"batch_size": 2, "sequence_length": 256},
    ),
    "Gemma 2, deep": (
        Gemma2Config(
            vocab_size=8000,
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            sliding_window=128,
        ),
        {"batch_size": 4, "sequence_length": 256, "penalty": {"free_support": False}},
    ),
    "OPT-125M": (
        OPTConfig(),
        {"batch_size": 1, "sequence_length": 256, "gradient_accumulation_steps": 2},
    ),
    "OPT-125M, fp32": (
        OPTConfig(),
        {"batch_size": 1, "sequence_length": 512, "precision": "fp32", "mask_structure": "2:4", "sparsity": None},
    ),
}


def modifier_of(fields: dict[str, Any]) -> ELSAModifier:
    """The modifier of a row: a projection in every step."""
    return ELSAModifier(**({"sparsity": 0.9, "steps": STEPS, "interval": 1, "lr": 1e-5} | fields))


def planned(name: str) -> int:
    """Bytes that the plan says."""
    config, fields = CASES[name]
    return Planner(config, gpus=1, capacity=0, tflops=1.0, device="cpu").plan(modifier_of(fields)).memory.total


def measured(name: str) -> int:
    """Bytes that a run takes, found out in this process, which should do nothing else."""
    config, fields = CASES[name]
    # What a first run loads and keeps (kernels, thread pools) is no part of a run's memory.
    _run(
        LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2), {"sparsity": 0.5}
    )
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts anew
    _run(config, fields)
    return _status("VmHWM") - before


def _run(config: PreTrainedConfig, fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    modifier = modifier_of({"batch_size": 1, "sequence_length": 64} | fields)
    accelerator = Accelerator()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    ids = torch.randint(0, config.vocab_size, (8, modifier.sequence_length), dtype=torch.int32)
    batches = PackedBatches(
        ids, ids, batch_size=modifier.batch_size, accumulation=modifier.gradient_accumulation_steps, seed=0
    )
    with trainable(model, accelerator.device):
        optimizer = modifier._build_optimizer(model, modifier._find_targets(model))
        scheduler = get_scheduler("linear", optimizer.base, num_warmup_steps=0, num_training_steps=STEPS)
        train(
            model,
            optimizer,
            scheduler,
            batches,
            steps=STEPS,
            max_grad_norm=modifier.max_grad_norm,
            precision=modifier.precision,
            accelerator=accelerator,
            history=[],
        )


def _status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def _measured_alone(name: str) -> int:
    command = [sys.executable, "-m", "benchmarks.plan_accuracy", "--measure", name]
    output = subprocess.run(command, env=os.environ | MALLOC, check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(json.loads(output.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", choices=CASES, help="Measure a row in this process, and print bytes.")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measured(arguments.measure)))
        return
    lines = []
    for name in CASES:
        plan, peak = planned(name), _measured_alone(name)
        lines.append(f"| {name} | {plan / 1e6:,.0f} | {peak / 1e6:,.0f} | {plan / peak:.3f} |")
        print(lines[-1], flush=True)
    publish("plan_accuracy", lines)


if __name__ == "__main__":
    main()
