"""The baseline does what its description says."""

import pytest
import torch
from llmcompressor import oneshot

from benchmarks.baselines.gradual import GradualPruningModifier, gradual_sparsity
from benchmarks.magnitude import pruned_linears

RUN = dict(steps=10, batch_size=2, sequence_length=16, lr=0.1)


def test_the_ramp():
    assert [gradual_sparsity(t, steps=4, sparsity=0.8) for t in (0, 2, 4, 9)] == pytest.approx([0, 0.7, 0.8, 0.8])


@pytest.mark.parametrize("fisher", [False, True])
def test_every_matrix_is_as_sparse_as_asked_after_every_step(fisher, load, texts, monkeypatch):
    counts, masks = [], []
    original = GradualPruningModifier._prune_

    def watched(self, weight, sparsity, second_moment):
        before = weight.detach().clone()
        original(self, weight, sparsity, second_moment)
        keep = weight.numel() - round(sparsity * weight.numel())
        score = before**2 * (second_moment if fisher else 1)
        least, most = score[weight != 0].min(), score[weight == 0].max() if keep < weight.numel() else 0
        assert int((weight != 0).sum()) == keep and least >= most
        assert torch.equal(weight[weight != 0], before[weight != 0])
        counts.append(sparsity)
        if weight.shape == (48, 32):
            masks.append(weight != 0)

    monkeypatch.setattr(GradualPruningModifier, "_prune_", watched)
    model = oneshot(model=load(), dataset=texts, recipe=[GradualPruningModifier(sparsity=0.8, fisher=fisher, **RUN)])
    linears = pruned_linears(model)
    assert len(linears) == 14 and len(counts) == 140
    assert counts[::14] == pytest.approx([0.8 * (1 - (1 - min(t / 6, 1)) ** 3) for t in range(1, 11)])
    assert all(int((m.weight != 0).sum()) == m.weight.numel() - round(0.8 * m.weight.numel()) for m in linears)
    # Weights may return: a mask holds entries that the one before it on the same weight did not.
    assert not fisher or any(bool((later & ~earlier).any()) for earlier, later in zip(masks, masks[4:], strict=False))
