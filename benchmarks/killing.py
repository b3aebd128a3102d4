"""What is pruned in runs that are killed, and what is looked at then: tiny random models, on a CPU, with one thread."""

import json
import multiprocessing
import os
import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig, PreTrainedTokenizerFast

from elsa_modifier import ELSAModifier
from elsa_modifier.resuming.directory import complete_checkpoints

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
fork = multiprocessing.get_context("fork")


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
    write_to(directory / "log")
    first = random.Random(0)
    texts = [" ".join(f"w{(first.randrange(94) + 7 * i) % 94}" for i in range(40)) for _ in range(64)]
    oneshot(
        model=str(directory / str(number)),
        dataset=Dataset.from_dict({"text": texts}),
        recipe=[ELSAModifier(**FIELDS | fields)],
        output_dir=str(directory / out),
    )


def wait_for(process: Any, directory: Path) -> None:
    """Until a start has ended by itself.

    :raises RuntimeError: with the end of its log, if it has failed
    """
    process.join()
    if process.exitcode:
        raise RuntimeError(f"a start ended with status {process.exitcode}: {(directory / 'log').read_text()[-4000:]}")


def last_step(training: Path) -> int:
    """Of the last complete checkpoint; 0 without one."""
    found = complete_checkpoints(training)
    return int(found[0].name.removeprefix("step-")) if found else 0


def step_to_kill_at(resumed_from: int, drawn: random.Random) -> int:
    """One of those after which a run that goes on from there makes a checkpoint."""
    return drawn.randrange(min(resumed_from + 2, STEPS), STEPS + 1, 2)


def write_to(file: Path) -> None:
    """Have all that this process prints appended to a file."""
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)


def being_written(training: Path, step: int) -> bool:
    """Whether a checkpoint of this step or a later one is."""
    return any(int(path.name.rpartition("-")[2]) >= step for path in training.glob(".partial-*"))


def moment(training: Path) -> str:
    """When a run was killed, in words."""
    if any(training.glob(".partial-*")):
        return "while a checkpoint was written"
    return "after a checkpoint" if complete_checkpoints(training) else "before the first checkpoint"


def same_weights(a: Path, b: Path) -> bool:
    """Whether two directories have models of the same bits."""
    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return first.keys() == second.keys() and all(
        torch.equal(first[n].view(torch.uint8), second[n].view(torch.uint8)) for n in first
    )


def same_history(a: Path, b: Path) -> bool:
    """Whether loss, gradient norm, residual and so on of every step are the same in what two runs have saved."""
    return _history(a) == _history(b)


def _history(directory: Path) -> list[dict[str, Any]]:
    steps = json.loads((directory / "elsa_history.json").read_text())["steps"]
    return [{key: value for key, value in step.items() if key != "seconds"} for step in steps]


def count(found: list[dict[str, Any]], field: str) -> int:
    """In how many of them a field is true."""
    return sum(bool(of[field]) for of in found)
