"""The loss over all logits of a batch at once."""

import torch
import torch.nn.functional as F


def whole_loss(model, batch):
    """What ``next_token_loss`` must agree with."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum")


def distilled_loss(model, teacher, batch, *, next_token, logits, hidden, temperature):
    """What ``Distillation`` must agree with, but for the last layer's error: token by token, layer by layer."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    found = model(**inputs, use_cache=False, output_hidden_states=True)
    with torch.no_grad():
        wanted = teacher(**inputs, use_cache=False, output_hidden_states=True)
    # Of the last layer a model gives hidden states only after its last norm.
    layers = list(zip(found.hidden_states[1:-1], wanted.hidden_states[1:-1], strict=True))
    total = 0.0
    for row, labels in enumerate(batch["labels"]):
        for position, word in enumerate(labels[1:].tolist()):
            if word == -100:
                continue
            p, q = (output.logits[row, position].float() for output in (wanted, found))
            total = total - next_token * torch.log_softmax(q, -1)[word]
            log_p, log_q = torch.log_softmax(p / temperature, -1), torch.log_softmax(q / temperature, -1)
            total = total + logits * temperature**2 * (log_p.exp() * (log_p - log_q)).sum()
            at = row, position
            errors = [(a[at] - b[at]).square().sum() / b[at].square().sum() for a, b in layers]
            total = total + hidden * sum(errors) / len(errors)
    return total
