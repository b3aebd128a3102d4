"""The same seed gives the same bits: two short runs on SmolLM2-135M through all phases, compared tensor by tensor."""

import torch
from llmcompressor import oneshot
from torch import Tensor

from benchmarks.assets import model_directory, training_texts
from elsa_modifier import ELSAModifier


def _run(seed: int) -> dict[str, Tensor]:
    modifier = ELSAModifier(
        sparsity=0.8, steps=8, batch_size=2, sequence_length=256, interval=2, finalize=0.75, seed=seed
    )
    model = oneshot(model=str(model_directory()), dataset=training_texts(), recipe=[modifier])
    state: dict[str, Tensor] = model.state_dict()
    return state


def main() -> None:
    first, again, other = _run(0), _run(0), _run(1)
    for name, result in (("the same seed", again), ("another seed", other)):
        equal = sum(torch.equal(first[key], result[key]) for key in first)
        print(f"{name}: {equal} of {len(first)} tensors bit-equal")


if __name__ == "__main__":
    main()
