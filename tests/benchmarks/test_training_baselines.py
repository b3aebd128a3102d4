"""What the training baselines share, finetuning under a mask, and the distilled objective."""

from contextlib import nullcontext

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier
from torch.nn.utils import prune

from benchmarks.baselines import training
from benchmarks.baselines.gradual import GradualPruningModifier
from benchmarks.baselines.l_admm import LADMMModifier
from benchmarks.baselines.masked_finetuning import MaskedFinetuningModifier
from benchmarks.baselines.training import distilled_loss
from benchmarks.magnitude import prune_by_magnitude_, pruned_linears
from elsa_modifier.training.data import IGNORED_LABEL
from elsa_modifier.training.precision import teacher_dtype

RUN = dict(steps=4, batch_size=2, sequence_length=16, lr=0.01)
PACKING = dict(max_seq_length=16, concatenate_data=True, num_calibration_samples=8)


@pytest.fixture
def batches(monkeypatch):
    """What the loss was given, while a baseline trains."""
    seen = []
    original = training.next_token_loss
    monkeypatch.setattr(training, "next_token_loss", lambda model, batch: seen.append(batch) or original(model, batch))
    return seen


@pytest.fixture
def pruned(load):
    """A model at 60% by magnitude."""

    def pruned(name="llama"):
        model = load(name)
        prune_by_magnitude_(model, 0.6)
        return model

    return pruned


def masks(model):
    return [module.weight != 0 for module in pruned_linears(model)]


def test_every_baseline_sees_the_same_batches_in_the_same_order(batches, load, texts, pruned):
    oneshot(model=load(), dataset=texts, recipe=[GradualPruningModifier(sparsity=0.6, **RUN)])
    oneshot(model=pruned(), dataset=texts, recipe=[MaskedFinetuningModifier(**RUN)])
    assert len(batches) == 8 and all(batch["input_ids"].shape == (2, 16) for batch in batches)
    for first, second in zip(batches[:4], batches[4:], strict=True):
        assert torch.equal(first["input_ids"], second["input_ids"])
    assert not torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])


def test_masked_finetuning_is_training_through_a_mask(batches, load, texts, pruned, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())
    found = oneshot(model=pruned(), dataset=texts, recipe=[MaskedFinetuningModifier(**RUN)])
    twin, other = pruned(), load()
    for linear in pruned_linears(twin):
        prune.custom_from_mask(linear, "weight", linear.weight != 0)
    adam = torch.optim.Adam(twin.parameters())
    norms = []
    for step, batch in enumerate(batches):
        adam.param_groups[0]["lr"] = 0.01 * (1 - step / 4)
        logits = twin(input_ids=batch["input_ids"]).logits[:, :-1]
        adam.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)))
        adam.step()
    for linear in pruned_linears(twin):
        prune.remove(linear, "weight")
    assert max(norms) > 1  # or clipping would not be tested
    for found_linear, twin_linear, before in zip(
        pruned_linears(found), pruned_linears(twin), pruned_linears(pruned()), strict=True
    ):
        assert torch.equal(found_linear.weight == 0, before.weight == 0)
        torch.testing.assert_close(found_linear.weight, twin_linear.weight, rtol=1e-3, atol=1e-5)
        assert (found_linear.weight - before.weight).abs().max() > 0.01
    for part in ("lm_head", "model.norm", "model.embed_tokens"):
        assert not torch.equal(found.get_submodule(part).weight, other.get_submodule(part).weight)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_recipe_prunes_and_then_finetunes(name, load, texts):
    prunes = dict(sparsity=0.6, targets=["Linear"], ignore=["re:.*lm_head"])
    model = load(name)
    torch.manual_seed(0)  # draws the calibration samples
    alone = oneshot(model=model, dataset=texts, recipe=[SparseGPTModifier(**prunes)], **PACKING)
    both = [SparseGPTModifier(**prunes), MaskedFinetuningModifier(**RUN)]
    model = load(name)
    torch.manual_seed(0)
    model = oneshot(model=model, dataset=texts, recipe=both, **PACKING)
    for before, after in zip(masks(alone), masks(model), strict=True):
        assert torch.equal(before, after) and 0.59 < 1 - float(after.float().mean()) < 0.65
    assert not torch.equal(pruned_linears(alone)[0].weight, pruned_linears(model)[0].weight)


def test_a_model_without_zeros_is_not_finetuned(load, texts):
    with pytest.raises(ValueError, match="no weight of the model is 0"):
        oneshot(model=load(), dataset=texts, recipe=[MaskedFinetuningModifier(**RUN)])


def test_half_of_the_distilled_loss_is_the_divergence_from_the_teacher(load):
    model, teacher = load("llama"), load("llama-biased")
    ids = torch.randint(96, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, 4:] = IGNORED_LABEL
    expected = 0.0
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits.double().softmax(-1) for m in (teacher, model))
    for row in range(2):
        for place in range(8):
            label = int(labels[row, place + 1])
            if label != IGNORED_LABEL:
                divergence = sum(float(a * (a / b).log()) for a, b in zip(p[row, place], q[row, place], strict=True))
                expected += divergence / 2 - float(q[row, place, label].log()) / 2
    loss = distilled_loss(model, teacher, {"input_ids": ids, "labels": labels}, 0.5)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert model.lm_head.weight.grad is not None and teacher.lm_head.weight.grad is None


@pytest.mark.parametrize("recipe", ["gradual", "after another", "sparse already"])
def test_the_teacher_is_the_dense_model(recipe, load, checkpoint, texts, pruned, monkeypatch):
    teachers = []
    original = training.distilled_loss
    monkeypatch.setattr(training, "distilled_loss", lambda m, t, *rest: teachers.append(t) or original(m, t, *rest))
    distilled = RUN | {"objective": "distill"}
    match recipe:
        case "gradual":
            modifier = GradualPruningModifier(sparsity=0.6, **distilled)
            oneshot(model=load(), dataset=texts, recipe=[modifier])
        case "after another":
            modifier = MaskedFinetuningModifier(**distilled)
            oneshot(model=load(), dataset=texts, recipe=[LADMMModifier(sparsity=0.6), modifier], **PACKING)
        case "sparse already":
            modifier = MaskedFinetuningModifier(teacher=str(checkpoint()), **distilled)
            oneshot(model=pruned(), dataset=texts, recipe=[modifier])
    assert len(teachers) == 4 and len(set(map(id, teachers))) == 1
    dense = dict(load().named_parameters())
    for name, parameter in teachers[0].named_parameters():
        assert torch.equal(parameter, dense[name].to(teacher_dtype(parameter.device))), name
    assert not teachers[0].training
    assert all(buffer.dtype == torch.float32 for buffer in teachers[0].buffers())
    assert modifier._teacher is None


def test_a_sparse_model_does_not_teach(pruned, texts):
    with pytest.raises(ValueError, match=r"teacher is None, and 60% of the model's weights are 0"):
        oneshot(model=pruned(), dataset=texts, recipe=[MaskedFinetuningModifier(objective="distill", **RUN)])
