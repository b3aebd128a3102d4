"""Quantize a pruned SmolLM2-135M to 4-bit weights in a process of its own, and keep every zero.

``python -m examples.quantize_after_pruning.quantize_smollm2 [DIR]``: DIR is a pruned checkpoint, dense or sparse;
without one, SmolLM2 is pruned to 80% first, which takes some minutes.
"""

import shutil
import sys
from pathlib import Path

import torch
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.assets import evaluation_sequences, training_texts
from benchmarks.pruned import pruned_directory
from elsa_modifier import MaskedGPTQModifier, save_sparse
from elsa_modifier.evaluation import perplexity

OUTPUT = Path("out/smollm2-135m-elsa-w4a16")


def main() -> None:
    pruned = Path(sys.argv[1]) if len(sys.argv) > 1 else pruned_directory(0.8)
    held_out = evaluation_sequences(AutoTokenizer.from_pretrained(pruned))
    model = AutoModelForCausalLM.from_pretrained(pruned)
    pruned_perplexity = {title: perplexity(model, ids) for title, ids in held_out.items()}
    zeros = {n: m.weight.detach() == 0 for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}

    shutil.rmtree(OUTPUT, ignore_errors=True)
    oneshot(
        model=str(pruned),
        dataset=training_texts(),
        recipe=[MaskedGPTQModifier(scheme="W4A16", ignore=["lm_head"])],
        num_calibration_samples=32,
        max_seq_length=512,
        concatenate_data=True,
        output_dir=str(OUTPUT / "quantized"),
    )
    save_sparse(OUTPUT / "quantized", OUTPUT / "sparse")

    # Saving has packed the weights: read them back as a user would.
    model = AutoModelForCausalLM.from_pretrained(OUTPUT / "sparse")
    print(f"\n{'perplexity, held out':<22}" + "".join(f"{title:>14}" for title in held_out))
    for name, values in {
        "pruned, bf16": pruned_perplexity,
        "and W4A16": {title: perplexity(model, ids) for title, ids in held_out.items()},
    }.items():
        print(f"{name:<22}" + "".join(f"{values[title]:>14,.1f}" for title in held_out))
    returned = sum(
        int((module.weight[zeros[name]] != 0).sum())
        for name, module in model.named_modules()
        if name in zeros and hasattr(module, "weight")
    )
    total = sum(int(mask.sum()) for mask in zeros.values())
    print(f"{total:,} pruned weights, {returned} of which came back")
    for directory in (pruned, OUTPUT / "quantized", OUTPUT / "sparse"):
        size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        print(f"{size / 1e6:8.1f} MB  {directory}")


if __name__ == "__main__":
    main()
