"""Parts of MaskedGPTQModifier's rule, on 15 layers of SmolLM2-135M pruned by ELSA: error on text that the Hessians did
not see, over stock GPTQ's with zeros put back, and time. Writes ``docs/results/masked_gptq_rules.md``.

``own`` starts from GPTQ with each row's own factor, ``usual`` from GPTQ with the factor of all columns, zeros put back;
then come the search of scales and rounds of descent and refitted scales. W4A16 in groups of 64.
"""

import argparse
import time
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from llmcompressor.modifiers.gptq import base
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.assets import evaluation_sequences, model_directory
from benchmarks.gptq_rules import multiplied, re_masked
from benchmarks.measuring import LENGTH, publish
from benchmarks.pruned import pruned_directory
from elsa_modifier.quantization import modifier
from elsa_modifier.quantization.llmcompressor_gptq import QuantizeWeight
from elsa_modifier.quantization.modifier import mask_aware

LAYERS, NAMES, GROUP = (0, 8, 16, 24, 29), ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"), 64


@dataclass
class _Layer:
    weight: Tensor
    hessians: list[Tensor]


def _layers(sparsity: float) -> list[_Layer]:
    """Weights with their Hessians on C4, and on Wikipedia."""
    model = AutoModelForCausalLM.from_pretrained(pruned_directory(sparsity), dtype=torch.float32)
    texts = evaluation_sequences(AutoTokenizer.from_pretrained(model_directory()), length=LENGTH, sequences=12)
    modules = [model.get_submodule(f"model.layers.{i}.{name}") for i in LAYERS for name in NAMES]
    layers = [_Layer(m.weight.detach().clone(), []) for m in modules]
    for ids in texts.values():
        for module, layer in zip(modules, layers, strict=True):
            layer.hessians.append(torch.zeros(module.weight.shape[1], module.weight.shape[1]))

            def add(_: Any, inputs: tuple[Tensor, ...], __: Any, hessian: Tensor = layer.hessians[-1]) -> None:
                x = inputs[0].flatten(0, 1)
                hessian.addmm_(x.T, x, alpha=2 / len(x))

            module._hook = module.register_forward_hook(add)
        with torch.no_grad():
            for row in ids:
                model(row.unsqueeze(0))
        for module in modules:
            module._hook.remove()
    return layers


def _run(rule: QuantizeWeight, layer: _Layer, args: QuantizationArgs) -> tuple[float, float]:
    """The error on the text that was held out, and seconds."""
    rows = layer.weight.shape[0]
    scale = (layer.weight.view(rows, -1, GROUP).abs().amax(dim=2) / 7.5).clamp(min=1e-6).bfloat16()
    batch = [t.unsqueeze(0) for t in (layer.weight.clone(), layer.hessians[0].clone(), scale)]
    started = time.perf_counter()
    quantized, *_ = rule(*batch, torch.zeros_like(batch[2], dtype=torch.int8), None, quant_args=args)
    seconds = time.perf_counter() - started
    error = layer.weight - quantized[0]
    return float(((error @ layer.hessians[1]) * error).sum()), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, nargs="+", default=(0.5, 0.7, 0.8, 0.9))
    arguments = parser.parse_args()
    args = preset_name_to_scheme("W4A16", ["Linear"]).weights
    args.group_size = GROUP
    stock = base.quantize_weight
    rules: dict[str, tuple[float, QuantizeWeight]] = {
        "re-masked": (0.0, re_masked(stock)),
        "multiplied": (0.0, multiplied(stock)),
        "own": (1.0, mask_aware(stock, refinements=0, fit_scales=False)),
        "own, search": (1.0, mask_aware(stock, refinements=0)),
        "own, search, 1 round": (1.0, mask_aware(stock, refinements=1)),
        "own, search, 4 rounds": (1.0, mask_aware(stock)),
        "usual, search, 4 rounds": (0.0, mask_aware(stock)),
    }
    lines = [
        "# Parts of the rule",
        "",
        "`python -m benchmarks.masked_gptq_rules`: mean over 15 layers of the error over re-masked's, seconds for all.",
        "",
        "| sparsity | " + " | ".join(rules) + " |",
        "|---" * (1 + len(rules)) + "|",
    ]
    for sparsity in arguments.sparsity:
        layers = _layers(sparsity)
        found: dict[str, list[tuple[float, float]]] = {}
        for name, (own_factors, rule) in rules.items():
            modifier._OWN_FACTORS = own_factors
            found[name] = [_run(rule, layer, args) for layer in layers]
        cells = []
        for results in found.values():
            ratios = [error / least for (error, _), (least, _) in zip(results, found["re-masked"], strict=True)]
            cells.append(f"{sum(ratios) / len(ratios):.3f}, {sum(seconds for _, seconds in results):.1f} s")
        lines.append(f"| {sparsity:.0%} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    publish("masked_gptq_rules", lines)


if __name__ == "__main__":
    main()
