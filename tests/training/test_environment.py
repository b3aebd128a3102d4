"""A run does not depend on what accelerate and its launcher leave in the environment."""

import json
import os
import subprocess
import sys

import torch

ACCELERATE = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_MIXED_PRECISION": "fp16",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_TORCH_DEVICE": "meta",
}
SCRIPT = """
import hashlib, json, sys
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from llmcompressor import oneshot
from elsa_modifier import ELSAModifier

torch.set_num_threads(1)
modifier = ELSAModifier(
    sparsity=0.9, steps=5, batch_size=2, gradient_accumulation_steps=2, sequence_length=16, lr=1e-3, precision="fp32"
)
model = oneshot(
    model=AutoModelForCausalLM.from_pretrained(sys.argv[1]),
    dataset=Dataset.from_dict({"input_ids": [[(7 * i) % 96 for i in range(j, j + 40)] for j in range(12)]}),
    recipe=[modifier],
)
history = [record.as_dict() | {"seconds": 0} for record in modifier.history]
weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
print("RESULT" + json.dumps([history, weights]))
"""


def _result(checkpoint, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    command = [sys.executable, "-c", SCRIPT, str(checkpoint)]
    run = subprocess.run(command, env=clean | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.split("RESULT")[1])


def test_no_bit_depends_on_accelerates_environment(checkpoint):
    plain = _result(checkpoint())
    assert len(plain[0]) == 5 and all(torch.tensor(record["loss"]).isfinite() for record in plain[0])
    assert _result(checkpoint(), **ACCELERATE) == plain
