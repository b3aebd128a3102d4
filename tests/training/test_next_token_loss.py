import torch

from elsa_modifier.training.objective import count_targets, next_token_loss


def test_nothing_is_kept_for_generation(load):
    """Keys and values of every layer would only take memory."""
    model, kept = load(), []
    model.model.register_forward_hook(lambda module, inputs, output: kept.append(output.past_key_values))
    ids = torch.arange(12).view(2, 6)
    assert next_token_loss(model, {"input_ids": ids, "labels": ids}).isfinite()
    assert kept == [None]


def test_targets_are_all_but_the_first_and_the_ignored():
    assert count_targets(torch.tensor([[1, 2, 3], [4, -100, 5], [-100, 6, -100]])) == 4
    assert count_targets(torch.tensor([[1], [2]])) == 0
