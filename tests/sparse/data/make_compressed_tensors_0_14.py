"""Writes data/compressed_tensors_0_14: a tiny Llama in the sparse-bitmask format, by the last version that wrote it.

Run in an environment of its own: pip install compressed-tensors==0.14.0 "transformers<5" accelerate psutil torch
"""

from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.config import BitmaskConfig
from transformers import LlamaConfig, LlamaForCausalLM

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
sparsity = BitmaskConfig(
    format="sparse-bitmask",
    global_sparsity=0.8,
    sparsity_structure="unstructured",
    targets=["Linear"],
    ignore=["lm_head"],
)
compressor = ModelCompressor(sparsity_config=sparsity)
out = Path(__file__).parent / "compressed_tensors_0_14"
model.save_pretrained(out, state_dict=compressor.compress(model), safe_serialization=True)
compressor.update_config(out)
