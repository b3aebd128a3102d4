"""A stock GPTQModifier after ELSAModifier uses this package's rule: putting zeros back afterwards is not as good."""

import pytest
import torch
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM

from elsa_modifier import ELSAModifier
from tests.quantization.test_modifier import ELSA, quantizer, run

FIRST = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]


def _errors(dense, quantized, texts, tokenizer):
    """Of what the first layer's projections say of the calibration texts, squared, by module."""
    inputs = []
    handle = dense.get_submodule(FIRST[0]).register_forward_hook(lambda module, args, output: inputs.append(args[0][0]))
    with torch.no_grad():
        for text in texts["text"]:
            dense(**tokenizer(text, return_tensors="pt", return_token_type_ids=False))
    handle.remove()
    seen = torch.cat(inputs).double()
    difference = {n: (dense.get_submodule(n).weight - quantized[n]).double() for n in FIRST}
    return {name: float((seen @ d.detach().T).square().sum()) for name, d in difference.items()}


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_errors_are_less_than_those_of_zeros_put_back(sparsity, checkpoint, texts, tokenizer, tmp_path):
    fields = ELSA | {"sparsity": sparsity}
    elsa = ELSAModifier(**fields)
    run(checkpoint(), texts, [elsa], output_dir=str(tmp_path))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path)
    stock = run(tmp_path, texts, [quantizer(GPTQModifier, "W4A16")])
    put_back = {name: stock.get_submodule(name).weight * elsa.masks[name] for name in FIRST}

    followed = run(checkpoint(), texts, [ELSAModifier(**fields), quantizer(GPTQModifier, "W4A16")])
    weights = {name: followed.get_submodule(name).weight for name in FIRST}
    assert all(not weights[name][~elsa.masks[name]].any() for name in FIRST)
    ours, theirs = (_errors(dense, found, texts, tokenizer) for found in (weights, put_back))
    print(ours, theirs)
    assert all(0 < ours[name] < 0.8 * theirs[name] for name in FIRST)
