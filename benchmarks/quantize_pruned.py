"""Rules for quantizing a pruned model with GPTQ, compared on SmolLM2-135M pruned by ELSA. Writes
``docs/results/quantize_pruned.md``.

Every rule gets the same pruned checkpoint, calibration text and scheme:

``re-masked``, ``multiplied``   see ``benchmarks.gptq_rules``
``ours``                        MaskedGPTQModifier
"""

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.assets import ASSETS, training_texts
from benchmarks.gptq_rules import multiplied, re_masked
from benchmarks.measuring import LENGTH, Results, publish
from benchmarks.pruned import pruned_directory
from elsa_modifier.evaluation import perplexity
from elsa_modifier.quantization.llmcompressor_gptq import QuantizeWeight, quantizing_weights_with
from elsa_modifier.quantization.modifier import MaskedGPTQModifier, mask_aware

SAMPLES = 16
SCHEMES = ("W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8_DYNAMIC")
RULES = ("re-masked", "multiplied", "ours")


class _OfAnyRule(MaskedGPTQModifier):
    """With the groups that MaskedGPTQModifier fits to the model, and the rule that is in force."""

    def compress_module_list(self, module_list: list[torch.nn.Module]) -> None:
        GPTQModifier.compress_module_list(self, module_list)


MAKERS: dict[str, Callable[[QuantizeWeight], QuantizeWeight]] = {
    "re-masked": re_masked,
    "multiplied": multiplied,
    "ours": mask_aware,
}


def quantize(directory: Path, modifier: GPTQModifier, *, text: int = 0, **options: Any) -> PreTrainedModel:
    """The model in a directory, quantized with the calibration text that everything here gets; or with another one."""
    torch.manual_seed(0)
    texts = training_texts()
    return oneshot(
        model=str(directory),
        dataset=texts.shuffle(seed=text) if text else texts,
        recipe=[modifier],
        num_calibration_samples=SAMPLES,
        max_seq_length=LENGTH,
        concatenate_data=True,
        **options,
    )


def quantized_path(sparsity: float, scheme: str) -> Path:
    """Where ``ours`` of a scheme is kept, as llm-compressor saves it."""
    return ASSETS / "quantized" / f"elsa-{round(100 * sparsity)}-{scheme.lower()}"


def _linears(model: PreTrainedModel) -> dict[str, Tensor]:
    return {n: m.weight.detach() for n, m in model.named_modules() if n.endswith("_proj")}


def _measure(results: Results, sparsity: float, scheme: str, rule: str, text: int) -> None:
    before = _linears(AutoModelForCausalLM.from_pretrained(pruned_directory(sparsity)))
    started = time.perf_counter()
    with quantizing_weights_with(MAKERS[rule]):
        model = quantize(pruned_directory(sparsity), _OfAnyRule(scheme=scheme, ignore=["lm_head"]), text=text)
    minutes = (time.perf_counter() - started) / 60
    after = _linears(model)
    total = sum(weight.numel() for weight in before.values())
    returned = sum(int(((weight == 0) & (after[name] != 0)).sum()) for name, weight in before.items())
    zeros = [sum(int((w == 0).sum()) for w in weights.values()) / total for weights in (before, after)]
    results.record(
        _label(scheme, rule, text),
        sparsity,
        {"minutes": round(minutes, 2), "zeros_before": zeros[0], "zeros_after": zeros[1], "returned": returned}
        | {title: round(perplexity(model, ids), 2) for title, ids in results.held_out.items()},
    )
    directory = quantized_path(sparsity, scheme)
    if rule == "ours" and text == 0 and not directory.exists():
        partial = directory.with_suffix(".partial")
        model.save_pretrained(partial, save_compressed=True)
        AutoTokenizer.from_pretrained(pruned_directory(sparsity)).save_pretrained(partial)
        partial.rename(directory)


def _label(scheme: str, rule: str, text: int) -> str:
    return f"{scheme} {rule}" + (f", text {text}" if text else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, nargs="+", default=(0.8, 0.5, 0.9))
    parser.add_argument("--scheme", nargs="+", choices=SCHEMES, default=SCHEMES)
    parser.add_argument("--rule", nargs="+", choices=RULES, default=RULES)
    parser.add_argument("--text", type=int, nargs="+", default=(0,), help="more than one say how much of it is chance")
    parser.add_argument("--publish", action="store_true", help="write the page from what was measured before")
    arguments = parser.parse_args()
    results = Results("quantize_pruned")
    if not arguments.publish:
        for sparsity in arguments.sparsity:
            dense = AutoModelForCausalLM.from_pretrained(pruned_directory(sparsity))
            pruned = {title: round(perplexity(dense, ids), 2) for title, ids in results.held_out.items()}
            results.record("pruned bf16", sparsity, pruned)
            for scheme in arguments.scheme:
                for rule, text in itertools.product(arguments.rule, arguments.text):
                    _measure(results, sparsity, scheme, rule, text)
    _publish(results)


def _publish(results: Results) -> None:
    latest = results.latest()
    sparsities = sorted({sparsity for _, sparsity in latest})
    texts = sorted({0, *(int(label.split(", text ")[1]) for label, _ in latest if ", text " in label)})
    lines = [
        "# Quantizing a pruned model with GPTQ",
        "",
        "`python -m benchmarks.quantize_pruned`: SmolLM2-135M pruned by ELSA;",
        f"{SAMPLES} calibration samples of {LENGTH} tokens. Perplexity on held-out C4 / Wikipedia; the script",
        "describes the rules. Texts other than 0 (`--text`) calibrate with other documents: what differs is chance.",
        "",
        "| sparsity | scheme | text | pruned bf16 | " + " | ".join(RULES) + " |",
        "|---" * (4 + len(RULES)) + "|",
    ]
    rows = []
    for sparsity, scheme, text in itertools.product(sparsities, SCHEMES, texts):
        found = {rule: latest.get((_label(scheme, rule, text), sparsity)) for rule in RULES}
        if any(found.values()):
            cells = [
                _cell(row) if row else "not measured" for row in (latest["pruned bf16", sparsity], *found.values())
            ]
            lines.append(f"| {sparsity:.0%} | {scheme} | {text} | " + " | ".join(cells) + " |")
            rows += [(f"{scheme} {rule}", sparsity, row) for rule, row in found.items() if row and text == 0]
    lines += [
        "",
        "Zeros before and after: what comes back is none; what is added are kept weights that round to zero.",
        "",
        "| sparsity | scheme and rule | zeros before | zeros after | pruned weights that came back |",
        "|---|---|---|---|---|",
        *(
            f"| {s:.0%} | {label} | {row['zeros_before']:.4%} | {row['zeros_after']:.4%} | {row['returned']:,} |"
            for label, s, row in rows
        ),
    ]
    publish("quantize_pruned", lines)


def _cell(row: dict[str, Any]) -> str:
    return f"{row['C4']:,.1f} / {row['Wikipedia']:,.1f}"


if __name__ == "__main__":
    main()
