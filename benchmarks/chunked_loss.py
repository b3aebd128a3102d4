"""Loss and gradients with the logits of a micro-batch in chunks of tokens, against all at once: memory and time.

A small Llama with a large vocabulary takes forward and backward passes under bf16 autocast, as a run does, in a process
of its own for each way: the gradients found chunk by chunk on the way forward (what a run does), checkpointed chunks,
whose head runs again in the backward pass, and whole logits. Memory is what the process's resident memory rises by at
most in the first pass, gradients being there already, with an allocator that gives freed tensors back at once. Time is
that of one processor, in passes each after one with whole logits; the ratio is the median over such pairs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.measuring import MALLOC, publish, resident
from elsa_modifier.training import objective
from elsa_modifier.training.objective import next_token_loss
from elsa_modifier.training.tail import run_body

CONFIG = LlamaConfig(
    vocab_size=128256,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
BATCH, LENGTH, PAIRS = 4, 512, 2
ROWS = (("whole", 0), ("chunks", 64), ("chunks", 256), ("chunks", 512), ("checkpointed", 512))  # MiB of a chunk
WAYS = {
    "whole": "whole logits",
    "chunks": "chunks, gradients on the way forward",
    "checkpointed": "chunks, checkpointed",
}


def _checkpointed_loss(model: PreTrainedModel, ids: torch.Tensor, size: int) -> torch.Tensor:
    split = run_body(model, {"input_ids": ids})
    assert split is not None
    hidden, tail = split
    targets = ids[:, 1:].flatten()

    def loss_of(rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(tail(rows).float(), labels, reduction="sum")

    parts = zip(hidden[:, :-1].flatten(0, 1).split(size), targets.split(size), strict=True)
    total = torch.zeros(())
    for rows, labels in parts:
        total = total + checkpoint(loss_of, rows, labels, use_reentrant=False)
    return total


def _measure(way: str, chunk_bytes: int) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32).train()
    ids = torch.randint(0, CONFIG.vocab_size, (BATCH, LENGTH))
    # What a first pass loads, and the gradients, are no part of it.
    _pass("whole", model, ids[:, :8], chunk_bytes)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    _pass(way, model, ids, chunk_bytes)
    peak = resident("VmHWM") - before
    pairs = [[_pass(each, model, ids, chunk_bytes) for each in ("whole", way)] for _ in range(PAIRS)]
    return {
        "bytes": peak,
        "seconds": statistics.median(seconds for _, seconds in pairs),
        "ratio": statistics.median(seconds / whole for whole, seconds in pairs),
    }


def _pass(way: str, model: PreTrainedModel, ids: torch.Tensor, chunk_bytes: int) -> float:
    """Seconds of a forward and a backward pass."""
    objective.CHUNK_BYTES = 2**60 if way == "whole" else chunk_bytes
    started = time.process_time()
    with torch.autocast("cpu", torch.bfloat16):
        if way == "checkpointed":
            loss = _checkpointed_loss(model, ids, chunk_bytes // (4 * CONFIG.vocab_size))
        else:
            loss = next_token_loss(model, {"input_ids": ids, "labels": ids})
    (loss / ids.numel()).backward()
    return time.process_time() - started


def _measured_alone(way: str, chunk_bytes: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.chunked_loss", "--way", way, "--bytes", str(chunk_bytes)]
    output = subprocess.run(command, env=os.environ | MALLOC, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=WAYS, help="Measure a row in this process, and print it as JSON.")
    parser.add_argument("--bytes", type=int, default=objective.CHUNK_BYTES, help="Of a chunk's logits in fp32.")
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(_measure(arguments.way, arguments.bytes)))
        return
    lines = [
        "# The loss in chunks of tokens",
        "",
        f"`python -m benchmarks.chunked_loss` prints and writes this: {BATCH} x {LENGTH} tokens, {CONFIG.vocab_size:,} "
        f"words, width {CONFIG.hidden_size}, {CONFIG.num_hidden_layers} layers, on a CPU; the script says what is "
        f"measured. A run's chunks are of {objective.CHUNK_BYTES >> 20} MiB. Here the head is nearly all of the work, "
        "so its share of the time is the largest that it can be.",
        "",
        "| logits | MiB of a chunk | peak, MB | seconds a pass | of those with whole logits |",
        "|---" * 5 + "|",
    ]
    for way, mib in ROWS:
        found = _measured_alone(way, mib << 20)
        cells = [WAYS[way], str(mib or ""), f"{found['bytes'] / 1e6:,.0f}", f"{found['seconds']:.2f}"]
        lines.append("| " + " | ".join([*cells, f"{found['ratio']:.2f}"]) + " |")
        print(lines[-1], flush=True)
    publish("chunked_loss", lines)


if __name__ == "__main__":
    main()
