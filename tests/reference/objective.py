"""The loss over all logits of a batch at once."""

import torch.nn.functional as F


def whole_loss(model, batch):
    """What ``next_token_loss`` must agree with."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum")
