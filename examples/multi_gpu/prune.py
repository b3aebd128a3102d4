"""Prune a model on all processes that torchrun has started.

    torchrun --nproc-per-node 8 -m examples.multi_gpu.prune MODEL TEXTS OUT [--recipe elsa_l_90]

TEXTS is a JSON-lines file with a ``text`` column, MODEL a directory or a name on the hub.
"""

import argparse

from datasets import load_dataset
from llmcompressor import oneshot

import elsa_modifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("texts")
    parser.add_argument("out")
    parser.add_argument("--recipe", default="elsa_l_90", help="a recipe of the package by name, or a file")
    arguments = parser.parse_args()
    named = arguments.recipe if arguments.recipe.endswith((".yaml", ".yml")) else elsa_modifier.recipe(arguments.recipe)
    oneshot(
        # A path would do too, but then every process reads the whole model into its own memory.
        model=elsa_modifier.load_for_ranks(arguments.model, dtype="auto"),
        tokenizer=arguments.model,
        dataset=load_dataset("json", data_files=arguments.texts, split="train"),
        recipe=str(named),
        output_dir=arguments.out,
    )


if __name__ == "__main__":
    main()
