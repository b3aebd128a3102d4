"""What loading a compressed model takes, in a process of its own: the model and about one dense layer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measuring import MALLOC
from elsa_sparse.writing import save_sparse
from tests.sparse.conftest import prune

pytest.importorskip("elsa_kernels")

MB = 10**6
# What torch, transformers and the allocator keep of what was used for a while.
OVERHEAD = 48 * MB
SCRIPT = """
import json, sys
from elsa_sparse import load_sparse
from tests.fuzzing import peak_memory
small, large, compressed = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
load_sparse(small, compressed=compressed)
before = peak_memory(reset=True)
model = load_sparse(large, compressed=compressed)
tensors = (*model.parameters(), *model.buffers())
held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
print(json.dumps({"growth": peak_memory() - before, "held": sum(held.values())}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """268 MB dense, in layers of 8 MB at most, and how many bytes it takes on disk."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8
    )
    directory = tmp_path_factory.mktemp("large")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.normal_()
    prune(model, 0.9).save_pretrained(directory / "dense")
    written = save_sparse(directory / "dense", directory / "sparse", encoding="bitmask", progress=False)
    return directory / "sparse", written


def _measure(small, directory, compressed):
    command = [sys.executable, "-c", SCRIPT, str(small), str(directory), str(compressed)]
    # Memory that is freed and kept would count here.
    environment = os.environ | MALLOC
    run = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2], env=environment
    )
    return json.loads(run.stdout.splitlines()[-1])


def test_peak_of_loading(large, sparse):
    directory, written = large
    dense = _measure(sparse(), directory, False)
    assert dense["held"] > 0.99 * written.dense_bytes > 250 * MB and dense["growth"] > dense["held"]
    compressed = _measure(sparse(overwrite=True), directory, True)
    print(f"dense {dense}, compressed {compressed}, on disk {written.stored_bytes}")
    assert compressed["held"] < 0.25 * dense["held"]
    # The files are mapped: their pages count, though the kernel may drop them.
    layer = 2 * 1024 * 4096
    assert compressed["growth"] < compressed["held"] + written.stored_bytes + 4 * layer + OVERHEAD
    assert compressed["growth"] < 0.7 * dense["held"]
