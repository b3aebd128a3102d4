"""Directories that servers load: a real pruned model, and small ones of random weights where shapes matter."""

import json
from pathlib import Path

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file

from benchmarks.assets import model_directory, training_texts
from benchmarks.random_llama import random_llama
from benchmarks.vllm_server import serve
from elsa_modifier import ELSAModifier, save_sparse
from elsa_sparse import unpack
from tests.serving.asking import ask, prompt_of
from tests.serving.engines import answers

# Halves of its 704 are no multiple of 64, which kernels step by.
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
DENSE_LAYER = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """SmolLM2-135M pruned to 90% in a few steps and written sparse by ``oneshot``; the same dense, and as bitmasks."""
    root = tmp_path_factory.mktemp("serving")
    oneshot(
        model=str(model_directory()),
        dataset=training_texts(),
        recipe=[ELSAModifier(sparsity=0.9, steps=4, batch_size=1, sequence_length=256, checkpoint="coded")],
        output_dir=str(root / "coded"),
    )
    unpack(root / "coded", root / "dense", progress=False)
    save_sparse(root / "dense", root / "bitmask", encoding="bitmask", progress=False)
    return root


@pytest.fixture(scope="session")
def dense_answer(checkpoints, tmp_path_factory):
    """What a server of the dense model answers."""
    with serve(checkpoints / "dense", tmp_path_factory.mktemp("log") / "dense.log") as server:
        answer = ask(server, prompt_of(checkpoints / "dense"))
        assert "Rebuilding sparse tensors" not in server.log
    return answer


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A random model of two layers at 90%, ``dense`` and ``sparse``; one of its linear layers has hardly a zero.

    Quantized, too: ``w4a16`` and ``w8a16`` have directories of the same names.
    """
    root = tmp_path_factory.mktemp("small")
    random_llama(root / "dense", 0.9, **SHAPE)
    file = root / "dense" / "model.safetensors"
    tensors = load_file(file)
    weight = tensors[DENSE_LAYER]
    tensors[DENSE_LAYER] = torch.randn(weight.shape, dtype=weight.dtype) * weight.shape[1] ** -0.5
    save_file(tensors, file, {"format": "pt"})
    save_sparse(root / "dense", root / "sparse", progress=False)
    for bits in (4, 8):
        write_quantized(root, bits)
    return root


@pytest.fixture(scope="session")
def small_prompt(small):
    return prompt_of(small / "dense", 300)


@pytest.fixture(scope="session")
def small_answers(small, small_prompt, tmp_path_factory):
    """Answers by directory of ``small``, and by what pruned weights are to become for those of ``sparse``."""
    kinds = {True: "sparse", "int8": "sparse", "int4": "sparse", False: "sparse"}
    kinds |= {name: name for name in ("dense", "w4a16/dense", "w4a16/sparse", "w8a16/dense", "w8a16/sparse")}
    asked = [(small / name, {} if key == name else {"compressed": key}) for key, name in kinds.items()]
    return dict(zip(kinds, answers(asked, small_prompt, tmp_path_factory.mktemp("engines")), strict=True))


def write_quantized(small: Path, bits: int) -> None:
    """That model quantized: ``sparse``, and ``dense`` with each integer times its scale."""
    root = small / f"w{bits}a16"
    grouping = {"strategy": "group", "group_size": 32} if bits == 4 else {"strategy": "channel"}
    weights = {"num_bits": bits, "type": "int", "symmetric": True, **grouping}
    group = {"targets": ["Linear"], "weights": weights}
    oneshot(
        model=str(small / "dense"),
        recipe=[QuantizationModifier(config_groups={"group_0": group}, ignore=["lm_head"])],
        output_dir=str(root / "packed"),
    )
    save_sparse(root / "packed", root / "sparse", progress=False)
    write_dequantized(root / "packed", root / "dense", bits)


def write_dequantized(packed: Path, target: Path, bits: int) -> None:
    """The dense twin of a pack-quantized directory, element by element as compressed-tensors describes the layout."""
    target.mkdir()
    for file in packed.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    stored = load_file(packed / "model.safetensors")
    tensors = {name: tensor for name, tensor in stored.items() if not name.startswith("model.layers") or "norm" in name}
    for name in [name.removesuffix("_packed") for name in stored if name.endswith("weight_packed")]:
        rows, columns = stored[f"{name}_shape"].tolist()
        words = stored[f"{name}_packed"].to(torch.int64) & 0xFFFFFFFF
        fields = [words >> shift & (1 << bits) - 1 for shift in range(0, 32, bits)]
        integers = torch.stack(fields, -1).view(rows, -1)[:, :columns] - (1 << bits - 1)
        scales = stored[f"{name}_scale"].float()
        dense = integers * scales.repeat_interleave(columns // scales.shape[1], 1)
        tensors[name] = dense.to(torch.bfloat16)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
