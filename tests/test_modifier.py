"""ELSAModifier inside the real ``oneshot``, on tiny random models."""

import json

import pytest
import torch
from datasets import Dataset
from llmcompressor import oneshot
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from elsa_modifier import ELSAModifier
from elsa_modifier import fields as objectives
from elsa_modifier.training.loop import TrainingDiverged

QUICK = dict(steps=10, batch_size=2, sequence_length=16, interval=3, lr=1e-3, precision="fp32", shared_budget=False)


def elsa(**fields):
    return ELSAModifier(**({"sparsity": 0.9} | QUICK | fields))


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}


def zeros(weight):
    return int((weight == 0).sum())


def assert_pruned(model, sparsity):
    for name, module in linears(model).items():
        assert zeros(module.weight) == round(sparsity * module.weight.numel()), name


@pytest.fixture
def tokens(tokenizer, texts):
    return texts.map(lambda row: tokenizer(row["text"]), remove_columns=["text"])


@pytest.mark.parametrize(
    "name", ["llama", "llama-tied", "llama-biased", "qwen2", "opt", "gpt-neox", "mixtral", "qwen3-moe"]
)
def test_every_linear_but_the_head_is_pruned(name, load, tokens):
    model = load(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    # Not the text: each model class has ideas of its own about the tokenizer.
    model = oneshot(model=model, dataset=tokens, recipe=[elsa()])
    assert len(linears(model)) >= 8
    assert_pruned(model, 0.9)
    head = model.get_output_embeddings().weight
    assert zeros(head) == 0
    if model.config.tie_word_embeddings:
        assert torch.equal(head, model.get_input_embeddings().weight)
    # Embeddings, norms and biases are trained along.
    after = dict(model.named_parameters())
    for parameter, value in before.items():
        if parameter in after and ("norm" in parameter or "embed_tokens" in parameter):
            assert not torch.equal(after[parameter], value), parameter


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_are_trained_through_real_routing(name, load, texts, before_first_step):
    model = load(name)
    calls = []
    tokens = QUICK["batch_size"] * QUICK["sequence_length"]

    def count(run, targets, optimizer):
        experts = [t for t in targets if ".experts." in t.name]
        assert len(experts) == 2 * 4 * 3
        for target in experts:
            if target.name.endswith("down_proj"):
                target.module.register_forward_pre_hook(lambda m, a: calls.append(a[0].shape[0] / tokens))

    before_first_step(count)
    model = oneshot(model=model, dataset=texts, recipe=[ELSAModifier(sparsity=0.5, **QUICK)])
    # Two of four experts a token: half of the tokens on average, where calibration of all experts would send them all.
    assert sum(calls) / len(calls) == pytest.approx(0.5)
    assert_pruned(model, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_model_comes_back_as_it_came(dtype, load, texts):
    model = load("llama", dtype)
    model.eval()
    model.model.norm.weight.requires_grad_(False)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    seen = {}

    class Watching(ELSAModifier):
        def on_calibration_start(self, state, event, **kwargs):
            seen["before"] = {n: p.requires_grad for n, p in state.model.named_parameters()}
            super().on_calibration_start(state, event, **kwargs)
            seen["after"] = {n: p.requires_grad for n, p in state.model.named_parameters()}

    rng = torch.get_rng_state()
    result = oneshot(
        model=model, dataset=texts, shuffle_calibration_samples=False, recipe=[Watching(sparsity=0.9, **QUICK)]
    )
    assert result is model
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not any(m.training for m in model.modules())
    assert seen["before"] == seen["after"]
    assert all(p.grad is None for p in model.parameters())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert torch.equal(torch.get_rng_state(), rng)
    assert_pruned(model, 0.9)
    ids = torch.arange(20).view(1, -1)
    assert model(input_ids=ids).logits.isfinite().all()


def test_path_recipe_file_and_output_directory(checkpoint, texts, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "prune_stage:\n  prune_modifiers:\n    ELSAModifier:\n      sparsity: 0.8\n      steps: 6\n"
        "      shared_budget: false\n      batch_size: 2\n      sequence_length: 16\n      finalize: 0.5\n"
    )
    out = tmp_path / "out"
    model = oneshot(model=str(checkpoint()), dataset=texts, recipe=str(recipe), output_dir=str(out))
    assert_pruned(model, 0.8)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    for (name, saved), (_, kept) in zip(loaded.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(saved, kept), name
    history = json.loads((out / "elsa_history.json").read_text())
    assert [s["step"] for s in history["steps"]] == [1, 2, 3, 4, 5, 6]
    assert history["modifier"]["sparsity"] == 0.8
    assert history["steps"][-1]["sparsity"] == pytest.approx(0.8, abs=1e-3)
    # The recipe that llm-compressor writes beside the model can be run again.
    again = oneshot(model=str(checkpoint()), dataset=texts, recipe=str(out / "recipe.yaml"))
    for (name, first), (_, second) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(first, second), name


def test_labels_of_a_tokenized_dataset_are_used(load, tokens):
    unlabelled = oneshot(model=load(), dataset=tokens, recipe=[elsa()])
    same = tokens.map(lambda row: {"labels": row["input_ids"]})
    masked = tokens.map(
        lambda row: {"labels": [-100] * (len(row["input_ids"]) // 2) + row["input_ids"][len(row["input_ids"]) // 2 :]}
    )
    weights = [oneshot(model=load(), dataset=d, recipe=[elsa()]).model.norm.weight for d in (same, masked)]
    assert torch.equal(weights[0], unlabelled.model.norm.weight)
    assert not torch.equal(weights[1], unlabelled.model.norm.weight)


def test_a_dataloader_is_used_as_it_is(load, tokens):
    rows = [torch.tensor((r["input_ids"] * 4)[:12]) for r in tokens]
    seen = []

    def collate(batch):
        seen.append(len(batch))
        return {"input_ids": torch.stack(batch), "attention_mask": torch.ones(len(batch), 12, dtype=torch.long)}

    model = oneshot(model=load(), dataset=DataLoader(rows, batch_size=3, collate_fn=collate), recipe=[elsa()])
    assert_pruned(model, 0.9)
    assert seen[:10] == [3] * 10


def test_same_seed_same_bits_other_seed_other_bits(load, texts):
    # OPT has dropout; the global random state must not matter.
    results = []
    for seed, noise in ((3, 1), (3, 2), (4, 1)):
        torch.manual_seed(noise)
        results.append(
            oneshot(model=load("opt"), dataset=texts, recipe=[elsa(seed=seed, precision="bf16")]).state_dict()
        )
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])
    assert any(not torch.equal(results[0][k], results[2][k]) for k in results[0])


@pytest.mark.parametrize("structure,zeroed,size", [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4), ("3:4", 3, 4)])
def test_structured_masks(structure, zeroed, size, load, texts):
    model = oneshot(model=load(), dataset=texts, recipe=[elsa(sparsity=None, mask_structure=structure)])
    for name, module in linears(model).items():
        groups = (module.weight == 0).view(module.weight.shape[0], -1, size).sum(dim=-1)
        assert (groups == zeroed).all(), name


def test_sparsity_per_layer(load, texts):
    mapping = {"model.layers.0.mlp.up_proj": 0.5, "re:.*mlp.*": 0.9, "re:.*self_attn.*": 0.7}
    model = oneshot(model=load(), dataset=texts, recipe=[elsa(sparsity=mapping)])
    for name, module in linears(model).items():
        expected = 0.5 if name == "model.layers.0.mlp.up_proj" else 0.9 if "mlp" in name else 0.7
        assert zeros(module.weight) == round(expected * module.weight.numel()), name


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.995])
def test_by_default_all_targets_share_what_one_sparsity_gives(sparsity, load, texts):
    model = oneshot(model=load(), dataset=texts, recipe=[elsa(sparsity=sparsity, shared_budget=None)])
    weights = [module.weight for module in linears(model).values()]
    assert sum(map(zeros, weights)) == sum(round(sparsity * w.numel()) for w in weights)
    apart = any(zeros(w) != round(sparsity * w.numel()) for w in weights)
    assert apart == (sparsity < 0.99)  # beyond, the cap leaves no choice


@pytest.mark.parametrize("fields", [dict(sparsity=0.8, shared_budget=False), dict(sparsity={"re:.*": 0.8})], ids=str)
def test_what_says_how_sparse_each_target_is_shares_nothing(fields, load, texts):
    model = oneshot(model=load(), dataset=texts, recipe=[elsa(**dict(shared_budget=None) | fields)])
    assert all(zeros(m.weight) == round(0.8 * m.weight.numel()) for m in linears(model).values())


def test_a_shared_budget_is_spent_within_floor_and_cap(load, texts):
    model = load()
    with torch.no_grad():
        for name, module in linears(model).items():
            module.weight.mul_(10.0 if "o_proj" in name else 0.1 if "up_proj" in name else 1.0)
    budget = dict(floor={"re:.*layers.0.*": 0.5}, cap=0.95)
    modifier = elsa(sparsity=0.8, shared_budget=budget, projection="magnitude")
    model = oneshot(model=model, dataset=texts, recipe=[modifier])
    found = {name: zeros(m.weight) / m.weight.numel() for name, m in linears(model).items()}
    # As many as without a shared budget.
    expected = sum(round(0.8 * m.weight.numel()) for m in linears(model).values())
    assert sum(zeros(m.weight) for m in linears(model).values()) == expected
    assert found["model.layers.0.self_attn.o_proj"] == pytest.approx(0.5, abs=1e-3)
    assert found["model.layers.1.self_attn.o_proj"] < 0.3
    assert found["model.layers.0.mlp.up_proj"] == pytest.approx(0.95, abs=1e-3)


@pytest.mark.parametrize(
    ("fields", "weight"),
    [
        (dict(sparsity=0.3), 0.5),
        (dict(sparsity=None, mask_structure="2:4"), 0.5),
        (dict(sparsity=0.65), 0.75),
        (dict(sparsity={"re:.*mlp": 0.9, "re:.*": 0.0}, shared_budget=None), None),
        (dict(sparsity=0.9), 1.0),
        (dict(sparsity=0.75, objective=dict(weight=0.3)), 0.3),
        (dict(sparsity=0.75, objective=dict(weight=0.0)), 0.0),
    ],
    ids=str,
)
def test_a_teacher_counts_more_the_fewer_weights_are_kept(fields, weight, load, texts, monkeypatch):
    made = []
    original = objectives.Distillation
    monkeypatch.setattr(objectives, "Distillation", lambda *a, **k: made.append(k) or original(*a, **k))
    model = oneshot(model=load(), dataset=texts, recipe=[elsa(**fields)])
    if weight is None:
        weights = [m.weight for m in linears(model).values()]
        weight = 0.5 + (sum(map(zeros, weights)) / sum(w.numel() for w in weights) - 0.5) / 0.6
    assert [k["logits"] for k in made] == [pytest.approx(weight, abs=1e-3)]
    assert made[0]["next_token"] == pytest.approx(1 - weight, abs=1e-3)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (dict(cap=0.7), "allow a sparsity of 0 to 0.6999, and sparsity asks for 0.9; widen them"),
        (dict(floor={"re:nothing": 0.5}), "shared_budget.floor has patterns that match no target"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(budget, message, load, texts):
    modifier = elsa(shared_budget=budget)
    with pytest.raises(ValueError, match=message):
        oneshot(model=load(), dataset=texts, recipe=[modifier])
    assert modifier.history == []


def test_targets_outside_the_mapping_and_ignored_ones_stay_dense(load, texts):
    model = oneshot(
        model=load(), dataset=texts, recipe=[elsa(sparsity={"re:.*mlp.*": 0.9}, ignore=["lm_head", "re:.*down_proj"])]
    )
    for name, module in linears(model).items():
        pruned = "mlp" in name and "down_proj" not in name
        assert (zeros(module.weight) > 0) == pruned, name


@pytest.mark.parametrize(
    "fields",
    [
        dict(penalty=dict(form="coupled", value=1e-3)),
        dict(penalty=dict(form="coupled", value=1e-3), sparsity_schedule="constant", finalize=1.0),
        dict(penalty=dict(dual=True, schedule="cosine")),
        dict(objective="next_token"),
        dict(objective="distill_hidden", sparsity_schedule="linear"),
        dict(objective="reconstruction"),
        dict(objective=dict(weight=0.5, temperature=2.0)),
        dict(projection="magnitude", optimizer="adamw"),
        dict(finalize=0.0),
        dict(gradient_accumulation_steps=3, lr_schedule="cosine", warmup_steps=2, max_grad_norm=None),
        dict(interval=1, lr=None, lr_schedule="constant"),
        dict(sparsity=0.0),
        dict(state_dtype="int8"),
        dict(state_dtype="float8_e4m3fn", penalty=dict(form="coupled", value=0.1)),
        dict(optimizer="adamfp8", weight_dtype="bf16", precision="bf16", state_dtype="float8_e5m2"),
        dict(optimizer="adam8bit_sr", gradient_release=True, max_grad_norm=None),
        dict(optimizer="adam8bit_sr", weight_dtype="bf16", precision="bf16", state_dtype="int8"),
        dict(gradient_release=True, max_grad_norm=None),
        dict(gradient_release=True, max_grad_norm=None, penalty=dict(form="coupled", value=1e-3)),
        dict(activation_checkpointing=True),
        dict(sparsity=0.8, shared_budget=dict(floor=0.8, cap=0.8), optimizer="adamfp8", state_dtype="int8"),
    ],
    ids=str,
)
def test_every_option_ends_exactly_sparse(fields, load, texts):
    modifier = elsa(**fields)
    model = oneshot(model=load(), dataset=texts, recipe=[modifier])
    assert_pruned(model, fields.get("sparsity", 0.9))
    assert len(modifier.history) == 10
    for name, mask in modifier.masks.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight != 0, mask)
        assert not torch.signbit(weight[~mask]).any()


@pytest.mark.parametrize("name", ["llama-tied", "qwen3-moe"])
@pytest.mark.parametrize("form", ["decoupled", "coupled"])
def test_releasing_gradients_changes_no_bit(name, form, load, tokens):
    """Neither does running layers again. Experts that saw no token in a step have no gradient to release."""
    settings = dict(max_grad_norm=None, penalty=dict(form=form, value=0.1))
    plain, released, checkpointed = (
        oneshot(model=load(name), dataset=tokens, recipe=[elsa(**settings, **fields)]).state_dict()
        for fields in ({}, dict(gradient_release=True), dict(activation_checkpointing=True))
    )
    for key, value in plain.items():
        assert torch.equal(released[key], value), key
        assert torch.equal(checkpointed[key], value), key


def test_released_gradients_are_not_alive_together(load, texts, before_first_step):
    alive = []

    def watch(run, targets, optimizer):
        step = optimizer.step_parameter

        def watched(parameter):
            alive.append(sum(p.grad is not None for p in run.parameters))
            step(parameter)

        optimizer.step_parameter = watched

    before_first_step(watch)
    modifier = ELSAModifier(**QUICK, sparsity=0.9, gradient_release=True, max_grad_norm=None)
    oneshot(model=load(), dataset=texts, recipe=[modifier])
    assert len(alive) >= 10 * 20 and max(alive) <= 3
    assert all(record.grad_norm > 0 for record in modifier.history)


def test_a_class_that_cannot_checkpoint_activations_is_refused(load, texts, monkeypatch):
    model = load()
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match="activation_checkpointing is true, but LlamaForCausalLM does not support it"):
        oneshot(model=model, dataset=texts, recipe=[elsa(activation_checkpointing=True)])


def test_a_model_keeps_its_checkpointing(load, texts):
    model = oneshot(model=load(), dataset=texts, recipe=[elsa(activation_checkpointing=True)])
    assert not model.is_gradient_checkpointing and model.dtype == torch.float32


def test_masked_training_follows_the_mask(load, texts, before_first_step):
    supports = []

    def watch(run, targets, optimizer):
        step = optimizer.step

        def watched(ok):
            step(ok)
            if optimizer.frozen:
                supports.append({t.name: (t.module.weight != 0).clone() for t in targets})

        optimizer.step = watched

    before_first_step(watch)
    modifier = ELSAModifier(**QUICK, sparsity=0.9, finalize=0.5)
    oneshot(model=load(), dataset=texts, recipe=[modifier])
    assert len(supports) == 6  # the step that fixes the mask, and five after it
    for support in supports:
        for name, mask in modifier.masks.items():
            assert torch.equal(support[name], mask)


def test_gptq_after_elsa_keeps_every_zero(load, texts):
    from llmcompressor.modifiers.gptq import GPTQModifier

    modifier = elsa()
    gptq = GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])
    model = oneshot(model=load(), dataset=texts, num_calibration_samples=8, recipe=[modifier, gptq])
    for name, mask in modifier.masks.items():
        assert not model.get_submodule(name).weight[~mask].any(), name


def test_smoothquant_before_elsa(load, texts):
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    model = oneshot(model=load(), dataset=texts, num_calibration_samples=8, recipe=[SmoothQuantModifier(), elsa()])
    assert_pruned(model, 0.9)


def test_an_offloaded_model(load, texts):
    from compressed_tensors.offload import set_onload_device

    plain = oneshot(model=load("llama-tied"), dataset=texts, recipe=[elsa()])
    offloaded = set_onload_device(load("llama-tied"), "cpu")
    offloaded = oneshot(model=offloaded, dataset=texts, recipe=[elsa()])
    for (name, first), second in zip(plain.named_parameters(), offloaded.parameters(), strict=True):
        assert torch.equal(first, second), name


def test_quantizing_before_pruning_is_refused(load, texts):
    from llmcompressor.modifiers.quantization import QuantizationModifier

    quantize = QuantizationModifier(targets="Linear", scheme="W8A16", ignore=["lm_head"])
    with pytest.raises(ValueError, match="put ELSAModifier first"):
        oneshot(model=load(), dataset=texts, recipe=[quantize, elsa()])


def test_no_dataset_is_refused_before_training(load):
    with pytest.raises(ValueError, match="pass dataset="):
        oneshot(model=load(), recipe=[elsa()])


@pytest.mark.parametrize(
    "fields,message",
    [
        (dict(targets=["re:nothing"]), "match no module"),
        (dict(sparsity={"re:.*mlp.*": 0.9, "re:nothing": 0.5}), "re:nothing"),
        (dict(targets=["LlamaRMSNorm"]), "no floating-point weight matrix"),
        (dict(sparsity=None, mask_structure="3:5"), "divisible by 5"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(fields, message, load, texts):
    model = load()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        oneshot(model=model, dataset=texts, recipe=[elsa(**fields)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_loss_that_is_not_finite_stops_the_run(load, texts):
    model = load()
    model.model.norm.weight.data[0] = 3e38
    with pytest.raises(TrainingDiverged, match="step 1: loss nan"):
        oneshot(model=model, dataset=texts, recipe=[elsa()])
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_dataset_without_text_is_refused(load):
    with pytest.raises(ValueError, match="0 tokens"):
        oneshot(model=load(), dataset=Dataset.from_dict({"input_ids": [[], []]}), recipe=[elsa()])


@pytest.mark.parametrize(
    "fields,message",
    [
        (dict(sparsity=1.0), "sparsity is 1.0; allowed is 0 up to"),
        (dict(sparsity=-0.1), "sparsity is -0.1"),
        (dict(sparsity={"re:.*": 2.0}), r"sparsity\['re:\.\*'\] is 2.0"),
        (dict(sparsity=None), "sparsity is not set"),
        (dict(sparsity=0.9, mask_structure="2:4"), "leave sparsity out"),
        (dict(mask_structure="4:2"), "mask_structure is '4:2'; allowed are"),
        (dict(steps=0), "steps\n  Input should be greater than or equal to 1"),
        (dict(batch_size=0), "batch_size"),
        (dict(sequence_length=1), "sequence_length"),
        (dict(lr=0.0), "lr\n"),
        (dict(lr=float("nan")), "lr\n"),
        (dict(lr_schedule="sometimes"), "lr_schedule\n  Input should be 'linear', 'cosine' or 'constant'"),
        (dict(warmup_steps=10), "warmup_steps is 10; allowed is less than steps, 10"),
        (dict(betas=[0.9, 1.0]), "betas is"),
        (dict(betas=[0.9]), "betas\n"),
        (dict(max_grad_norm=0), "max_grad_norm"),
        (dict(optimizer="sgd"), "optimizer\n  Input should be 'adam', 'adamw', 'adam8bit_sr'"),
        (dict(shared_budget=dict(cap=1.5)), "shared_budget.cap is 1.5; allowed is 0 to 1"),
        (dict(sparsity=None, mask_structure="2:4", shared_budget={}), "shared_budget is set, but mask_structure 2:4"),
        (dict(dual_dtype="bf16"), "dual_dtype: bf16: one tensor holds dual and split here.* Set state_dtype instead"),
        (dict(dual_dtype="bf16", split_dtype="int8"), "dual_dtype: bf16, split_dtype: int8: one tensor"),
        (dict(state_dtype="fp4"), "state_dtype\n  Input should be 'fp32', 'bf16'"),
        (dict(weight_dtype="bf16", precision="bf16"), "use one that rounds stochastically: adam8bit_sr"),
        (dict(weight_dtype="bf16", optimizer="adam8bit_sr"), "a bf16 model computes in bf16"),
        (dict(gradient_release=True), "set max_grad_norm to null"),
        (dict(offload_state=True, optimizer="adam8bit"), "offload_state is true and optimizer 'adam8bit'"),
        (
            dict(gradient_release=True, max_grad_norm=None, gradient_accumulation_steps=2),
            "gradient_accumulation_steps must be 1, not 2",
        ),
        (dict(interval=0), "interval"),
        (dict(penalty=dict(value=1.5)), "penalty.value is 1.5; the decoupled form allows 0 to 1"),
        (dict(penalty=dict(form="coupled")), "penalty.value is not set"),
        (dict(penalty=dict(schedule="never")), "penalty.schedule\n  Input should be 'constant', 'linear'"),
        (dict(penalty=dict(strength=1)), "penalty.strength\n  Extra inputs"),
        (dict(projection="wanda"), "projection\n  Input should be 'fisher' or 'magnitude'"),
        (dict(finalize=1.5), "finalize\n  Input should be less than or equal to 1"),
        (dict(precision="fp16"), "precision\n  Input should be 'auto', 'bf16' or 'fp32'"),
        (dict(sparsty=0.9), "sparsty\n  Extra inputs"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        elsa(**fields)
