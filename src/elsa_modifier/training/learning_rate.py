"""A learning rate for users who set none."""

import math

__all__ = ["default_learning_rate"]


def default_learning_rate(*, steps: int, width: int, sparsity: float) -> float:
    """Peak learning rate of Adam for a pruning run.

    ``0.75 / width x (64 / steps)^(1/4)`` at 80%: with Adam every weight moves by about the rate a step, so what a
    layer puts out moves by the rate times its width (Yang et al., arXiv 2203.03466). Beyond 300 steps the power is 1/8,
    between what was best at width 64, in 1,200 and 4,096 steps over a little text about the rate of 300, and what the
    paper used in 4,096 steps from 768 to 5120: it is within a factor of 2.5 of that, but for one model, and within 2 of
    the best of those tried at width 64 (300 to 4,096 steps) and 576 (64 steps). At lower sparsity, where less has to be
    relearned, less is better. Beyond 80% it grows as the kept weights become few, with the power 1/3 of their fraction,
    another fit: at width 64 twice the rate of 80% was best at 95%, and 1.5 times at 90%, where at width 576 1.4 times
    was as good as 1.

    :param steps: optimizer steps of the run
    :param width: the model's hidden size
    :param sparsity: fraction of zeros over all pruned weights
    """
    if sparsity <= 0.8:
        relearning = 0.4 + 0.6 * max((sparsity - 0.5) / 0.3, 0.0)
    else:
        # Not beyond what was tried.
        relearning = math.pow(0.2 / (1.0 - min(sparsity, 0.975)), 1 / 3)
    shorter = min(steps, 300)
    length = math.pow(64 / shorter, 1 / 4) * math.pow(shorter / steps, 1 / 8)
    return 0.75 / width * length * relearning
