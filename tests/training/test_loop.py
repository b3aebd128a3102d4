import math

import pytest
import torch
from loguru import logger
from transformers import get_scheduler

from elsa_modifier.admm import ADMMOptimizer, MaskStructure, PenaltySchedule, PrunedWeight
from elsa_modifier.evaluation import perplexity
from elsa_modifier.training import precision
from elsa_modifier.training.data import IGNORED_LABEL, PackedBatches
from elsa_modifier.training.loop import TrainingDiverged, train
from elsa_modifier.training.objective import count_targets, next_token_loss

PRUNED = "model.layers.0.mlp.up_proj.weight"


def sequences(count=8, length=12):
    return torch.randint(0, 96, (count, length), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


def run(
    model, *, batch_size=4, accumulation=1, steps=8, labels=None, base=torch.optim.Adam, projection="fisher", **options
):
    ids = sequences()
    source = PackedBatches(
        ids, ids if labels is None else labels, batch_size=batch_size, accumulation=accumulation, seed=0
    )
    weight = model.get_parameter(PRUNED)
    inner = base(model.parameters(), lr=1e-2)
    optimizer = ADMMOptimizer(
        inner,
        [PrunedWeight(PRUNED, weight, weight.numel() // 4, MaskStructure())],
        penalty=PenaltySchedule(0.3, "cosine", 6),
        interval=2,
        projection=projection,
        freeze_step=6,
    )
    history = []
    settings = {"max_grad_norm": 1.0, "precision": "fp32"} | options
    scheduler = get_scheduler("linear", inner, num_warmup_steps=0, num_training_steps=steps)
    train(model, optimizer, scheduler, source, steps=steps, device=torch.device("cpu"), history=history, **settings)
    return history


def test_history_says_what_happened(load):
    history = run(load())
    assert [r.step for r in history] == list(range(1, 9))
    assert [r.residual is not None for r in history] == [True, False, True, False, True, True, False, False]
    assert [r.mask_entered is not None for r in history] == [r.residual is not None for r in history]
    assert [r.sparsity for r in history] == [0.0] * 5 + [0.75] * 3
    assert [r.penalty for r in history][6:] == [0.0, 0.0]
    assert history[0].learning_rate == 1e-2
    assert history[0].tokens == 4 * 11
    assert history[0].loss == pytest.approx(math.log(96), rel=0.1)
    assert history[-1].loss < history[0].loss
    assert "residual" not in history[1].as_dict()


def test_accumulation_does_not_change_the_result(load):
    whole, parts = load(), load()
    run(whole, batch_size=4)
    run(parts, batch_size=1, accumulation=4)
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_accumulation_weighs_tokens_not_micro_batches(load):
    labels = sequences().clone()
    labels[::2, 2:] = IGNORED_LABEL
    whole, parts = load(), load()
    run(whole, batch_size=8, labels=labels)
    run(parts, batch_size=1, accumulation=8, labels=labels)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_divergence_is_met_before_it_reaches_a_weight(load):
    model = load()
    model.model.embed_tokens.weight.data[:] = float("inf")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(TrainingDiverged, match=r"step 1: loss nan.*Lower lr \(now 0.01\)"):
        run(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_labels_that_are_all_masked_are_refused(load):
    with pytest.raises(ValueError, match="a batch has no token to predict"):
        run(load(), labels=torch.full_like(sequences(), IGNORED_LABEL))


def test_clipping_bounds_the_gradient_and_reports_the_norm_before_it(load):
    norms = []

    class Watching(torch.optim.SGD):
        def step(self, closure=None):
            gradients = [p.grad for p in self.param_groups[0]["params"] if p.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    history = run(load(), base=Watching, projection="magnitude", max_grad_norm=0.01)
    assert all(record.grad_norm > 0.01 for record in history)
    assert norms == pytest.approx([0.01] * 8, rel=1e-3)


@pytest.mark.parametrize("options", [{}, dict(gradient_release=True)], ids=["together", "released"])
def test_once_the_mask_is_fixed_the_norm_is_of_what_it_keeps(options, load):
    """Nearly all of this model's gradient lies where nothing can move: clipping by it would leave hardly a step."""
    model = load()
    weight = model.get_parameter(PRUNED)
    weight.register_hook(lambda gradient: gradient + 1e3 * (weight == 0))
    norms = []

    class Watching(torch.optim.Adam):
        def step(self, closure=None):
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(gradients)))
            if weight.grad is not None and optimizer_is_frozen(weight):
                assert not weight.grad[weight == 0].any()
            super().step(closure)

    def optimizer_is_frozen(weight):
        return int((weight == 0).sum()) == weight.numel() - weight.numel() // 4

    history = run(model, base=Watching, max_grad_norm=None, **options)
    frozen = history[6:]
    assert len(frozen) == 2 and all(record.grad_norm < 100 for record in frozen)
    if not options:
        assert [record.grad_norm for record in frozen] == pytest.approx(norms[6:], rel=1e-5)


@pytest.mark.parametrize(
    "stopped,weights", [(3, "trained in part, and not pruned"), (7, "pruned, and trained in part")]
)
def test_an_interrupted_run_says_what_it_leaves(stopped, weights, load):
    told = []

    class Interrupted(torch.optim.Adam):
        def step(self, closure=None):
            if len(told) == stopped - 1:
                raise KeyboardInterrupt
            told.append(None)
            super().step(closure)

    said = []
    handler = logger.add(lambda message: said.append(message.record["message"]), level="ERROR")
    model = load()
    try:
        with pytest.raises(KeyboardInterrupt):
            run(model, base=Interrupted)
    finally:
        logger.remove(handler)
    (message,) = said
    assert f"Interrupted in step {stopped} of 8, after {stopped - 1} whole ones" in message
    assert f"are {weights}" in message and "Nothing has been saved" in message
    weight = model.get_parameter(PRUNED)
    zeros = int((weight == 0).sum())
    assert zeros == (weight.numel() - weight.numel() // 4 if stopped > 6 else 0)


def test_loss_is_the_models_own(load):
    model = load()
    ids = sequences().long()
    labels = ids.clone()
    labels[:, 5:7] = IGNORED_LABEL
    with torch.no_grad():
        ours = next_token_loss(model, {"input_ids": ids, "labels": labels}) / count_targets(labels)
        theirs = model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(ours, theirs)


def test_perplexity_is_exp_of_the_mean_loss_and_leaves_the_mode(load):
    model = load().train()
    ids = sequences()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = math.exp(model.eval()(input_ids=ids.long(), labels=ids.long()).loss)
    model.train()
    assert perplexity(model, ids, batch_size=3) == pytest.approx(expected, rel=1e-4)
    assert model.training


def test_perplexity_of_bf16_weights_is_found_in_fp32_where_bf16_is_not_multiplied(load, monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: False)
    model = load(dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = perplexity(load(dtype=torch.bfloat16).float(), sequences(), precision="fp32")
    assert perplexity(model, sequences()) == expected
    after = model.state_dict()
    assert all(
        after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in before.items()
    )
