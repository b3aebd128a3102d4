"""Rules for quantizing a pruned model with GPTQ, compared on SmolLM2-135M pruned by ELSA. Writes
``docs/results/quantize_pruned.md``.

Every rule gets the same pruned checkpoint, calibration text and scheme:

``re-masked``    stock GPTQ, and pruned weights that came back set to zero again
``multiplied``   the rule of llm-compressor up to 0.12: what an error adds to other weights is multiplied by the mask
``masked``       GPTQ on each row's kept columns alone: ``refinements: 0``, ``fit_scales: false``
``fitted``       the same, coordinate descent, and scales fitted to the kept weights: what MaskedGPTQModifier does
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.assets import training_texts
from benchmarks.measuring import LENGTH, Results, publish
from benchmarks.pruned import pruned_directory
from elsa_modifier.evaluation import perplexity
from elsa_modifier.quantization.llmcompressor_gptq import QuantizeWeight, entry_quantizer, quantizing_weights_with
from elsa_modifier.quantization.modifier import MaskedGPTQModifier, mask_aware

SAMPLES = 16
SCHEMES = ("W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8_DYNAMIC")
RULES = ("re-masked", "multiplied", "masked", "fitted")


def _re_masked(original: QuantizeWeight) -> QuantizeWeight:
    def quantize_weight(weights: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        mask = weights != 0
        quantized, losses, fell_back = original(weights, *args, **kwargs)
        return quantized * mask, losses, fell_back

    return quantize_weight


def _multiplied(original: QuantizeWeight) -> QuantizeWeight:
    """One weight at a time, column after column, with the factor of the whole Hessian."""

    def quantize_weight(
        weights: Tensor,
        hessians: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        global_scale: Tensor | None,
        quant_args: Any,
        blocksize: int = 128,
        percdamp: float = 0.01,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight, hessian = weights[0].float(), hessians[0].clone()
        mask = weight != 0
        rows, columns = weight.shape
        quantize = entry_quantizer(quant_args, scale[0], zero_point[0], None, (rows, columns))
        order = hessian.diagonal().argsort(descending=True)
        hessian = hessian[order][:, order]
        dead = hessian.diagonal() == 0
        hessian.diagonal().add_(dead + percdamp * hessian.diagonal().mean())
        factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
        weight, mask, result = weight[:, order], mask[:, order], torch.zeros_like(weight)
        all_rows = torch.arange(rows)
        for j in range(columns):
            column = quantize(weight[:, j], all_rows, order[j].expand(rows)) * mask[:, j]
            error = (weight[:, j] - column) / factor[j, j]
            weight[:, j:] -= error[:, None] * factor[j, j:] * mask[:, j:]
            result[:, order[j]] = column
        return result.unsqueeze(0).to(weights.dtype), torch.zeros(1), torch.zeros(1, dtype=torch.bool)

    return quantize_weight


class _OfAnyRule(MaskedGPTQModifier):
    """With the groups that MaskedGPTQModifier fits to the model, and the rule that is in force."""

    def compress_module_list(self, module_list: list[torch.nn.Module]) -> None:
        GPTQModifier.compress_module_list(self, module_list)


MAKERS: dict[str, Callable[[QuantizeWeight], QuantizeWeight]] = {
    "re-masked": _re_masked,
    "multiplied": _multiplied,
    "masked": partial(mask_aware, refinements=0, fit_scales=False),
    "fitted": mask_aware,
}


def _quantize(sparsity: float, scheme: str, rule: str) -> PreTrainedModel:
    torch.manual_seed(0)
    with quantizing_weights_with(MAKERS[rule]):
        return oneshot(
            model=str(pruned_directory(sparsity)),
            dataset=training_texts(),
            recipe=[_OfAnyRule(scheme=scheme, ignore=["lm_head"])],
            num_calibration_samples=SAMPLES,
            max_seq_length=LENGTH,
            concatenate_data=True,
        )


def _linears(model: PreTrainedModel) -> dict[str, Tensor]:
    return {n: m.weight.detach() for n, m in model.named_modules() if n.endswith("_proj")}


def _measure(results: Results, sparsity: float, scheme: str, rule: str) -> None:
    before = _linears(AutoModelForCausalLM.from_pretrained(pruned_directory(sparsity)))
    started = time.perf_counter()
    model = _quantize(sparsity, scheme, rule)
    minutes = (time.perf_counter() - started) / 60
    after = _linears(model)
    total = sum(weight.numel() for weight in before.values())
    returned = sum(int(((weight == 0) & (after[name] != 0)).sum()) for name, weight in before.items())
    zeros = [sum(int((w == 0).sum()) for w in weights.values()) / total for weights in (before, after)]
    results.record(
        f"{scheme} {rule}",
        sparsity,
        {"minutes": round(minutes, 2), "zeros_before": zeros[0], "zeros_after": zeros[1], "returned": returned}
        | {title: round(perplexity(model, ids), 2) for title, ids in results.held_out.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, nargs="+", default=(0.8, 0.5, 0.9))
    parser.add_argument("--scheme", nargs="+", choices=SCHEMES, default=SCHEMES)
    parser.add_argument("--rule", nargs="+", choices=RULES, default=RULES)
    parser.add_argument("--publish", action="store_true", help="write the page from what was measured before")
    arguments = parser.parse_args()
    results = Results("quantize_pruned")
    if not arguments.publish:
        for sparsity in arguments.sparsity:
            dense = AutoModelForCausalLM.from_pretrained(pruned_directory(sparsity))
            pruned = {title: round(perplexity(dense, ids), 2) for title, ids in results.held_out.items()}
            results.record("pruned bf16", sparsity, pruned)
            for scheme in arguments.scheme:
                for rule in arguments.rule:
                    _measure(results, sparsity, scheme, rule)
    _publish(results)


def _publish(results: Results) -> None:
    latest = results.latest()
    lines = [
        "# Quantizing a pruned model with GPTQ",
        "",
        "`python -m benchmarks.quantize_pruned`: SmolLM2-135M pruned by ELSA;",
        f"{SAMPLES} calibration samples of {LENGTH} tokens. Perplexity on held-out C4 / Wikipedia; the script",
        "describes the rules.",
        "",
        "| sparsity | scheme | pruned bf16 | " + " | ".join(RULES) + " |",
        "|---" * (3 + len(RULES)) + "|",
    ]
    rows = []
    for sparsity in sorted({sparsity for _, sparsity in latest}):
        pruned = latest["pruned bf16", sparsity]
        for scheme in SCHEMES:
            found = [latest.get((f"{scheme} {rule}", sparsity)) for rule in RULES]
            if not any(found):
                continue
            cells = [_cell(pruned), *(_cell(row) if row else "not measured" for row in found)]
            lines.append(f"| {sparsity:.0%} | {scheme} | " + " | ".join(cells) + " |")
            rows += [(f"{scheme} {rule}", sparsity, row) for rule, row in zip(RULES, found, strict=True) if row]
    lines += [
        "",
        "Zeros before and after: what comes back is none; what is added are kept weights that round to zero.",
        "",
        "| sparsity | scheme and rule | zeros before | zeros after | pruned weights that came back | minutes |",
        "|---|---|---|---|---|---|",
        *(
            f"| {s:.0%} | {label} | {row['zeros_before']:.4%} | {row['zeros_after']:.4%} | {row['returned']:,} "
            f"| {row['minutes']} |"
            for label, s, row in rows
        ),
    ]
    publish("quantize_pruned", lines)


def _cell(row: dict[str, Any]) -> str:
    return f"{row['C4']:,.1f} / {row['Wikipedia']:,.1f}"


if __name__ == "__main__":
    main()
