"""What each process of tests/training/test_ranks.py runs; in one process, and without arguments, the twin of each case.

``python -m torch.distributed.run --nproc-per-node 2 -m tests.training.ranks_worker <checkpoints> <results> <case>...``
"""

import errno
import itertools
import os
import signal
import sys
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

from elsa_modifier import ELSAModifier
from elsa_modifier.admm.optimizer import ADMMOptimizer
from elsa_modifier.evaluation import perplexity
from elsa_modifier.resuming import storage
from elsa_modifier.resuming.manifest import CheckpointDamaged
from elsa_modifier.training import chunks, objective
from elsa_modifier.training.loading import load_for_ranks
from elsa_modifier.training.loop import TrainingDiverged
from tests.conftest import CONFIGS, make_tokenizer

# 6 rows on 4 ranks leave one empty, 50 are uneven, and 24 is no multiple of any block.
UNEVEN = LlamaConfig(
    hidden_size=24,
    intermediate_size=50,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=6,
    vocab_size=96,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
MODELS = {name: CONFIGS[name] for name in ("llama", "qwen3-moe")} | {"uneven": UNEVEN}

BASE = dict(sparsity=0.8, steps=12, batch_size=4, sequence_length=16, interval=3, lr=3e-3, precision="fp32")
ELSA_L = dict(
    weight_dtype="bf16",
    precision="bf16",
    optimizer="adam8bit_sr",
    state_dtype="int8",
    penalty=dict(value=0.3, dual=True),
)
TWO_OF_FOUR = dict(sparsity=None, mask_structure="2:4")
OWN = dict(shared_budget=False, objective="next_token")

STOPPED = dict(checkpoint_every={"steps": 4}, checkpoint_keep=9, checkpoint_dir="{directory}/{name}-{count}")

# Fields of ELSAModifier, and what begins with "_" is for run().
CASES = {
    "budget": dict(_model="llama"),
    "budget ddp": dict(_model="llama", parallel="ddp"),
    "coupled": dict(
        _model="llama",
        objective="distill_hidden",
        shared_budget=False,
        penalty=dict(form="coupled", value=1e-2, schedule="cosine"),
    ),
    "2:4": dict(_model="llama", **TWO_OF_FOUR),
    "2:4 ddp": dict(_model="llama", parallel="ddp", **TWO_OF_FOUR),
    "chunks": dict(_model="llama", _chunks=True),
    "accumulation": dict(_model="llama", batch_size=2, gradient_accumulation_steps=3, activation_checkpointing=True),
    "autocast": dict(_model="llama", precision="bf16", steps=6, **OWN),
    "own loader": dict(_model="llama", _loader=True, **OWN),
    "uneven": dict(_model="uneven", gradient_accumulation_steps=2),
    "uneven own": dict(_model="uneven", sparsity=0.55, penalty=dict(value=0.3, dual=True), **OWN),
    "empty": dict(_model="uneven", _load=load_for_ranks, _save=True),
    "experts": dict(_model="qwen3-moe", batch_size=2, sequence_length=3, **OWN),
    "frozen": dict(_model="llama", _frozen=True, **OWN),
    "elsa-l": dict(_model="llama", **ELSA_L),
    "elsa-l ddp": dict(_model="llama", parallel="ddp", **ELSA_L),
    "elsa-l 2:4": dict(_model="llama", **ELSA_L, **TWO_OF_FOUR),
    "own group": dict(_model="llama", _group=True, _load=load_for_ranks, _save=True, **OWN),
    "released": dict(
        _model="llama", **(ELSA_L | dict(gradient_release=True, max_grad_norm=None, objective="next_token"))
    ),
    "stopped": dict(_model="llama", **STOPPED),
    "stopped elsa-l": dict(_model="llama", **ELSA_L, **STOPPED),
    "goes on from 1": dict(_model="llama", resume="{directory}/stopped-1/step-00000004"),
    "goes on from 2": dict(_model="llama", resume="{directory}/stopped-2/step-00000004"),
    "elsa-l goes on from 2": dict(_model="llama", **ELSA_L, resume="{directory}/stopped elsa-l-2/step-00000004"),
    "told to stop": dict(_model="llama", _signal=1, _raises=SystemExit, **STOPPED),
    "goes on after the signal": dict(
        _model="llama", **(STOPPED | dict(checkpoint_dir="{directory}/told to stop-{count}"))
    ),
    "disk full": dict(_model="llama", _full=1, **STOPPED),
    "damaged": dict(
        _model="llama", _harm=True, _raises=CheckpointDamaged, resume="{directory}/stopped-2/step-00000008"
    ),
    "diverges": dict(_model="llama", _raises=TrainingDiverged, **(STOPPED | dict(lr=1e25, max_grad_norm=None))),
    "fails": dict(_model="llama", _fails=1, **OWN),
    "torchao": dict(_model="llama", **(ELSA_L | dict(optimizer="adamfp8"))),
}


def at_step(number, rank):
    """Do to one rank what a case says, in the middle of a step, from 0."""
    for case, action in (("_fails", lose_disk), ("_signal", terminate)):
        if number == 2 and str(rank.get(case)) == os.environ.get("RANK"):
            action()


def lose_disk():
    raise OSError("rank 1 has lost its disk")


def terminate():
    # Twice, as by a scheduler that tells all processes and a launcher that passes it on.
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)


def fill_disk_after(checkpoints):
    """Let this process write so many training checkpoints; to those that follow there is no space left."""
    inner, count = storage._write_safetensors, itertools.count()

    def write(*args):
        if next(count) >= checkpoints:
            raise OSError(errno.ENOSPC, "No space left on device")
        return inner(*args)

    storage._write_safetensors = write


def harm(checkpoint):
    file = Path(checkpoint) / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def save_models(directory):
    for name, config in MODELS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict()))
        model.save_pretrained(directory / name)
        make_tokenizer().save_pretrained(directory / name)


def documents():
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in torch.randint(5, 60, (64,), generator=generator).tolist():
        first = int(torch.randint(0, 94, (1,), generator=generator))
        rows.append([2 + (first + 7 * i) % 94 for i in range(length)])
    return rows


def own_loader(batch):
    """Padded batches; on ranks but the first, other ones: nobody promises that all ranks have the same."""
    rows = documents() if os.environ.get("RANK", "0") == "0" else documents()[::-1]
    rows = [row[:24] for row in rows]

    def collate(some):
        width = max(map(len, some))
        return {
            "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in some]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in some]),
        }

    return DataLoader(rows, batch_size=batch, collate_fn=collate)


class Counting(TorchDispatchMode):
    """What is sent within the context: one (operation, bytes) a collective."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [t for a in args for t in (a if isinstance(a, list | tuple) else [a])]
            sizes = [t.nbytes for t in tensors if isinstance(t, torch.Tensor)]
            self.sent.append((func.__name__, max(sizes, default=0)))
        return func(*args, **(kwargs or {}))


def run(name, directory, **others):
    """Prune as a case says: state dict, masks, history, perplexity, and what ADMM's steps have sent."""
    fields = BASE | CASES[name] | others
    special = {key: fields.pop(key) for key in list(fields) if key.startswith("_")}
    count = os.environ.get("WORLD_SIZE", 1)
    places = {key: value for key, value in fields.items() if isinstance(value, str) and "{" in value}
    fields |= {key: value.format(directory=directory, name=name, count=count) for key, value in places.items()}
    path = directory / special["_model"]
    torch.manual_seed(7)
    model = special.get("_load", AutoModelForCausalLM.from_pretrained)(path)
    if "_frozen" in special:
        model.get_input_embeddings().requires_grad_(False)
    dataset = Dataset.from_dict({"input_ids": documents()})
    if "_loader" in special:
        dataset = own_loader(4)
    out = None if "_save" not in special else str(directory / f"{name}-{count}")
    modifier = ELSAModifier(**fields)
    sent = []
    step, summing = ADMMOptimizer.step, chunks.sum_in_chunks

    def counted(self, ok=None):
        at_step(self.step_count, special)
        with Counting() as counting:
            step(self, ok)
        sent.append(counting.sent)

    if "_group" in special and "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    if "_harm" in special and os.environ["RANK"] == "0":
        harm(fields["resume"])
    used, writing = [], storage._write_safetensors
    if str(special.get("_full")) == os.environ.get("RANK"):
        fill_disk_after(1)
    before = objective.CHUNK_BYTES
    try:
        ADMMOptimizer.step = counted
        if "_chunks" in special:
            objective.CHUNK_BYTES = 4 * 96 * 7
            objective.sum_in_chunks = lambda *args, **kwargs: used.append(1) or summing(*args, **kwargs)
        model = oneshot(
            model=model,
            tokenizer=make_tokenizer(),
            dataset=dataset,
            recipe=[modifier],
            output_dir=out,
            num_calibration_samples=8,
        )
    except special.get("_raises", ()) as error:
        return {"raised": f"{type(error).__name__}: {error}", "weights": {}}
    finally:
        ADMMOptimizer.step, objective.CHUNK_BYTES, objective.sum_in_chunks = step, before, summing
        storage._write_safetensors = writing
    if "_group" in special and "RANK" in os.environ:
        assert torch.distributed.is_initialized()
        torch.distributed.destroy_process_group()
    if "_chunks" in special and not used:
        raise AssertionError("nothing was computed in chunks")
    ids = torch.tensor([row[:16] for row in documents() if len(row) >= 16])
    return {
        "weights": model.state_dict(),
        "masks": modifier.masks,
        "history": [record.as_dict() for record in modifier.history],
        "perplexity": perplexity(model, ids),
        "sent": sent,
        "entries": sum(p.numel() for p in model.parameters()),
        "saved": out,
    }


def main():
    torch.set_num_threads(1)
    directory, results, *names = sys.argv[1:]
    found = {}
    for name in names:
        found[name] = run(name, Path(directory))
    if os.environ["RANK"] == "0":
        torch.save(found, results)
    else:
        # Every rank has the whole model back, unless it was loaded for the first alone.
        own = {name: of.get("raised", of["weights"]) for name, of in found.items()}
        torch.save(own, f"{results}.{os.environ['RANK']}")


if __name__ == "__main__":
    main()
