"""Writes data/sparse_version_1: a tiny pruned Llama in version 1 of the sparse format, two shards and an index.

Run with the last version of this package that wrote it (FORMAT_VERSION 1).
"""

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from elsa_sparse import save_sparse

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=24,
    intermediate_size=44,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
)
model = LlamaForCausalLM(config).to(torch.bfloat16)
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.mul_(torch.rand_like(parameter, dtype=torch.float32) > 0.8)
with tempfile.TemporaryDirectory() as dense:
    model.save_pretrained(dense)
    save_sparse(dense, Path(__file__).parent / "sparse_version_1", max_shard_size="6KB", progress=False)
