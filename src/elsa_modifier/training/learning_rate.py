"""A learning rate for users who set none."""

import math

__all__ = ["default_learning_rate"]


def default_learning_rate(*, steps: int, width: int, sparsity: float) -> float:
    """Peak learning rate of Adam for a pruning run.

    At 80% and more, ``2e-4`` for the paper's 4,096 steps at width 768, falling with the root of the width: within 60%
    of what the paper used from OPT-125M to LLaMA-2-13B. Short runs want more, as the cube root of the steps (see
    docs/results/ablation.md); at lower sparsity, where less has to be relearned, less is better.

    :param steps: optimizer steps of the run
    :param width: the model's hidden size
    :param sparsity: fraction of zeros over all pruned weights
    """
    relearning = 0.4 + 0.6 * min(max((sparsity - 0.5) / 0.3, 0.0), 1.0)
    return 2e-4 * math.sqrt(768 / width) * math.pow(4096 / steps, 1 / 3) * relearning
