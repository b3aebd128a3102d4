"""Prune SmolLM2-135M-Instruct to 80% in three ways, measure them on held-out text; save, reload, let it speak."""

import shutil
import time
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.recipe import Recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import elsa_modifier  # noqa: F401  (registers ELSAModifier)
from benchmarks.assets import evaluation_sequences, model_directory, training_texts
from benchmarks.baselines.gradual import GradualPruningModifier
from benchmarks.magnitude import linear_sparsity, prune_by_magnitude_
from elsa_modifier.evaluation import perplexity

RECIPE = Path(__file__).parent / "recipe.yaml"
OUTPUT = Path("out/smollm2-135m-elsa-80")
SPARSITY = 0.8
GRADUAL_LR = 9e-4


def main() -> None:
    source = model_directory()
    tokenizer = AutoTokenizer.from_pretrained(source)
    held_out = evaluation_sequences(tokenizer)
    rows: list[tuple[str, float, dict[str, float]]] = []

    def measure(name: str, model: PreTrainedModel) -> None:
        rows.append((name, linear_sparsity(model), {t: perplexity(model, ids) for t, ids in held_out.items()}))

    model = AutoModelForCausalLM.from_pretrained(source)
    measure("dense", model)
    prune_by_magnitude_(model, SPARSITY)
    measure("magnitude", model)

    # The textbook way to spend the same tokens, with what the recipe says and the best of the learning rates tried.
    (modifier,) = Recipe.create_instance(str(RECIPE)).modifiers
    budget = {name: getattr(modifier, name) for name in ("sparsity", "steps", "batch_size", "sequence_length")}
    gradual = GradualPruningModifier(**budget, lr=GRADUAL_LR)
    measure("gradual pruning", oneshot(model=str(source), dataset=training_texts(), recipe=[gradual]))

    started = time.perf_counter()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    model = oneshot(model=str(source), dataset=training_texts(), recipe=str(RECIPE), output_dir=str(OUTPUT))
    minutes = (time.perf_counter() - started) / 60
    measure("ELSA", model)

    print(f"\n{'perplexity, held out':<22}{'sparsity':>9}" + "".join(f"{title:>14}" for title in held_out))
    for name, sparsity, values in rows:
        print(f"{name:<22}{sparsity:>9.1%}" + "".join(f"{values[title]:>14,.1f}" for title in held_out))
    print(f"\noneshot took {minutes:.1f} minutes; the checkpoint is in {OUTPUT}")

    reloaded = AutoModelForCausalLM.from_pretrained(OUTPUT)
    saved, kept = reloaded.state_dict(), model.state_dict()
    different = [name for name in kept if not torch.equal(saved[name], kept[name].cpu())]
    if different or saved.keys() != kept.keys():
        raise SystemExit(f"the reloaded checkpoint differs from the model in {different or 'its tensors'}")
    print(f"reloaded with transformers: {len(kept)} tensors, bit-equal")

    prompt = "The city lies on the river and"
    inputs = tokenizer(prompt, return_tensors="pt")
    output = reloaded.generate(**inputs, max_new_tokens=30, do_sample=False, repetition_penalty=1.3)
    print(f"it says: {tokenizer.decode(output[0], skip_special_tokens=True)!r}")


if __name__ == "__main__":
    main()
