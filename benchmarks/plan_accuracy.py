"""``elsa plan`` against measurement: planned bytes and the peak of a process that really trains.

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
from llmcompressor.utils.dev import get_main_device
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, OPTConfig, PreTrainedConfig, get_scheduler

from benchmarks.measuring import MALLOC, publish, resident
from elsa_modifier import ELSAModifier
from elsa_modifier.planning import MemoryPlan, Planner
from elsa_modifier.training.data import PackedBatches
from elsa_modifier.training.loop import train
from elsa_modifier.training.model_state import trainable
from elsa_modifier.training.parallel import Alone
from elsa_modifier.training.run import build_optimizer

STEPS = 2

# What the rows vary: depth against width, vocabulary, kind of attention and of norm, tied or not; and the recipe.
LLAMA = LlamaConfig(
    vocab_size=64000,
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
GEMMA = Gemma2Config(
    vocab_size=8000,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=12,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    sliding_window=128,
)
WIDE_LLAMA = LlamaConfig(**LLAMA.to_dict() | {"vocab_size": 128256, "hidden_size": 192})
WIDE_GEMMA = Gemma2Config(**GEMMA.to_dict() | {"vocab_size": 256000})
LEAN = {
    "state_dtype": "int8",
    "gradient_release": True,
    "max_grad_norm": None,
    "activation_checkpointing": True,
}
REMARKS = (
    "Lean: state_dtype int8, gradient_release, activation_checkpointing. What the plan does not see is inside single "
    "operations, such as the copies that a matrix product makes of its operands, the allocator's rounding, and blocks "
    "below 128 kB that glibc keeps. A GPU has its context and fragmentation instead; neither is measured here."
)
CASES: dict[str, tuple[PreTrainedConfig, dict[str, Any]]] = {
    "Llama, large vocabulary": (LLAMA, {"batch_size": 4, "sequence_length": 256}),
    "Gemma 2, deep": (
        GEMMA,
        {"batch_size": 8, "sequence_length": 256, "penalty": {"form": "coupled", "value": 0.1}},
    ),
    "OPT-125M": (OPTConfig(), {"batch_size": 1, "sequence_length": 512, "gradient_accumulation_steps": 2}),
    "Gemma 2, lean": (GEMMA, {"batch_size": 8, "sequence_length": 256} | LEAN),
    "Llama, lean, bf16 and adam8bit_sr": (
        LLAMA,
        {"batch_size": 4, "sequence_length": 256, "weight_dtype": "bf16", "optimizer": "adam8bit_sr"} | LEAN,
    ),
    "Llama, logits in chunks": (WIDE_LLAMA, {"batch_size": 4, "sequence_length": 512}),
    "Gemma 2, logits in chunks, lean, bf16 and adam8bit_sr": (
        WIDE_GEMMA,
        {"batch_size": 4, "sequence_length": 512, "weight_dtype": "bf16", "optimizer": "adam8bit_sr"} | LEAN,
    ),
}


def modifier_of(fields: dict[str, Any]) -> ELSAModifier:
    """The modifier of a row: a projection in every step."""
    return ELSAModifier(**({"sparsity": 0.9, "steps": STEPS, "interval": 1, "lr": 1e-5} | fields))


def planned(name: str) -> MemoryPlan:
    """What the plan says."""
    config, fields = CASES[name]
    return Planner(config, gpus=1, capacity=0, tflops=1.0, device="cpu").plan(modifier_of(fields)).memory


def measured(name: str) -> int:
    """Bytes that a run takes, found out in this process, which should do nothing else."""
    config, fields = CASES[name]
    # What a first run loads and keeps (kernels, thread pools) is no part of a run's memory.
    _run(
        LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2), {"sparsity": 0.5}
    )
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts anew
    _run(config, fields)
    return resident("VmHWM") - before


def _run(config: PreTrainedConfig, fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    modifier = modifier_of({"batch_size": 1, "sequence_length": 64} | fields)
    device = get_main_device()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    ids = torch.randint(0, config.vocab_size, (8, modifier.sequence_length), dtype=torch.int32)
    batches = PackedBatches(
        ids, ids, batch_size=modifier.batch_size, accumulation=modifier.gradient_accumulation_steps, seed=0
    )
    with trainable(
        model,
        device,
        dtype=torch.bfloat16 if modifier.weight_dtype == "bf16" else torch.float32,
        activation_checkpointing=modifier.activation_checkpointing,
    ):
        optimizer = build_optimizer(modifier, Alone(model), modifier._find_targets(model))
        scheduler = get_scheduler("linear", optimizer.base, num_warmup_steps=0, num_training_steps=STEPS)
        train(
            model,
            optimizer,
            scheduler,
            batches,
            steps=STEPS,
            max_grad_norm=modifier.max_grad_norm,
            precision="fp32" if modifier.precision == "fp32" else "bf16",  # as the plan reads it
            device=device,
            history=[],
            gradient_release=modifier.gradient_release,
        )


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
    lines = [
        "# The plan against measurement",
        "",
        f"Megabytes, on a CPU. Measured: peak resident memory of {STEPS} training steps in a process of their own, "
        "less what was resident before the model was built. Held: weights, moments and ADMM state, by the plan; the "
        "rest of the peak, gradients and activations, is what has to be found out, and is compared alone as well.",
        "",
        "`python -m benchmarks.plan_accuracy` prints and writes this.",
        "",
        "| model | held | planned | measured | planned / measured | the rest, planned / measured |",
        "|---" * 6 + "|",
    ]
    for name in CASES:
        plan, peak = planned(name), _measured_alone(name)
        held = plan.weights + plan.optimizer + plan.admm_state
        cells = [name, *(f"{count / 1e6:,.0f}" for count in (held, plan.total, peak))]
        cells += [f"{plan.total / peak:.3f}", f"{(plan.total - held) / (peak - held):.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    publish("plan_accuracy", [*lines, "", REMARKS])


if __name__ == "__main__":
    main()
