"""Memory of each of 1, 2 and 4 ranks against ``elsa plan``, with a Llama whose weights are most of what is held.

Ranks are CPU processes joined by gloo, forks of one that has imported everything. Measured is the peak of a process's
resident memory in the run (``VmHWM``) less what was resident just before. That is before the model was built in one
process, which trains the model itself; with several, the first one has it in main memory besides what it trains, as
on a GPU, so it is after the model was built. glibc is told to return blocks to the kernel as soon as they are freed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.measuring import MALLOC, publish, resident
from benchmarks.ranks import save_tokenizer
from elsa_modifier import ELSAModifier
from elsa_modifier.planning import MemoryPlan, Planner
from elsa_modifier.training.loading import load_for_ranks
from elsa_modifier.training.ranks import is_first_process

COUNTS = (1, 2, 4)
FIELDS: dict[str, Any] = dict(sparsity=0.8, steps=2, batch_size=4, sequence_length=8, interval=1, lr=1e-5)
RECIPES: dict[str, dict[str, Any]] = {
    "fp32, Adam, teacher": {"precision": "fp32"},
    "ELSA-L (bf16, adam8bit_sr), teacher": {
        "weight_dtype": "bf16",
        "optimizer": "adam8bit_sr",
        "activation_checkpointing": True,
    },
}
SHAPE: dict[str, Any] = dict(
    vocab_size=4096,
    hidden_size=1536,
    intermediate_size=4096,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=12,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
TINY = SHAPE | dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
)


def measure(directory: str, result: str, recipe: str) -> None:
    """In this process, one of several or the only one: prune, and leave the bytes that it took."""
    torch.set_num_threads(1)
    # What a first run loads and keeps (kernels, thread pools, connections) is no part of a run's memory.
    _prune(_model(Path(directory) / "tiny"), directory, recipe)
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    model = None if alone else _model(Path(directory) / "large")
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts anew
    _prune(model or _model(Path(directory) / "large"), directory, recipe)
    Path(f"{result}.{os.environ.get('RANK', '0')}").write_text(str(resident("VmHWM") - before))


def _model(directory: Path) -> PreTrainedModel:
    """Random weights in the first process; elsewhere what ``load_for_ranks`` makes of a configuration."""
    if not is_first_process():
        return load_for_ranks(directory)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(directory))
    model.config._name_or_path = str(directory)
    return model


def _prune(model: PreTrainedModel, directory: str, recipe: str) -> None:
    words = torch.randint(1, 512, (16, FIELDS["sequence_length"]), generator=torch.Generator().manual_seed(0))
    modifier = ELSAModifier(**FIELDS | RECIPES[recipe])
    oneshot(
        model=model,
        tokenizer=f"{directory}/large",
        dataset=Dataset.from_dict({"input_ids": words.tolist()}),
        recipe=[modifier],
    )


def measured(directory: Path, recipe: str, ranks: int) -> list[int]:
    """Bytes of each rank."""
    result = directory / "bytes"
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="memory",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, measure)(str(directory), str(result), recipe)
    return [int(Path(f"{result}.{rank}").read_text()) for rank in range(ranks)]


def planned(recipe: str, ranks: int) -> MemoryPlan:
    """What the plan says of each rank."""
    planner = Planner(LlamaConfig(**SHAPE), gpus=ranks, capacity=0, tflops=1.0, device="cpu")
    return planner.plan(ELSAModifier(**FIELDS | RECIPES[recipe])).memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs=2, help="Measure in forks of this process: recipe, ranks.")
    arguments = parser.parse_args()
    if arguments.measure:
        recipe, ranks = arguments.measure
        with tempfile.TemporaryDirectory() as made:
            directory = Path(made)
            for name, shape in (("tiny", TINY), ("large", SHAPE)):
                LlamaConfig(**shape).save_pretrained(directory / name)
                save_tokenizer(directory / name)
            print(json.dumps(measured(directory, recipe, int(ranks))))
        return
    size = sum(p.numel() for p in AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).parameters())
    lines = [
        "# Memory of each rank",
        "",
        f"`python -m benchmarks.rank_memory`: a Llama of {size / 1e6:.0f}M parameters, {FIELDS['steps']} steps of "
        f"{FIELDS['batch_size']} sequences of {FIELDS['sequence_length']} tokens, on CPU processes joined by gloo; the "
        "script says what is measured. Megabytes: what `elsa plan` says of each GPU, on as many, and the peak of the "
        "ranks' resident memory, from the emptiest rank to the fullest.",
        "",
        "| recipe | ranks | planned | measured | planned / fullest |",
        "|---" * 5 + "|",
    ]
    for recipe in RECIPES:
        for ranks in COUNTS:
            command = [sys.executable, "-m", "benchmarks.rank_memory", "--measure", recipe, str(ranks)]
            output = subprocess.run(command, env=os.environ | MALLOC, check=True, stdout=subprocess.PIPE, text=True)
            found = sorted(json.loads(output.stdout.splitlines()[-1]))
            plan = planned(recipe, ranks).total
            span = " to ".join(f"{count / 1e6:,.0f}" for count in (found[:1] if ranks == 1 else [found[0], found[-1]]))
            lines.append(f"| {recipe} | {ranks} | {plan / 1e6:,.0f} | {span} | {plan / found[-1]:.3f} |")
            print(lines[-1], flush=True)
    publish("rank_memory", lines)


if __name__ == "__main__":
    main()
