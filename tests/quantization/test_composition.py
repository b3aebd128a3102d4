"""Every ordered pair with a modifier of this package, and sensible triples: right, or refused before the first step."""

import copy

import pytest
import torch
from compressed_tensors.quantization import forward_quantize
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.gptq import base as gptq_base
from llmcompressor.modifiers.pruning import WandaPruningModifier
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from elsa_modifier import ELSAModifier, MaskedGPTQModifier, load_sparse
from elsa_modifier.quantization import llmcompressor_gptq
from elsa_modifier.training.loop import TrainingDiverged
from tests.conftest import CONFIGS
from tests.quantization import composition
from tests.quantization.composition import DOCUMENT, PAIRS, PRUNERS, QUANTIZERS, TRIPLES, W4, Case

QUICK = dict(steps=4, batch_size=2, sequence_length=16, precision="fp32", shared_budget=False)


@pytest.fixture(autouse=True)
def unpinned(monkeypatch):
    # llm-compressor 0.14 pins memory for AWQ even where there is no accelerator to pin it for.
    monkeypatch.setattr(IntermediatesCache, "pin_memory", lambda *_, **__: None)


@pytest.fixture(scope="module")
def run(checkpoint, texts):
    def run(recipe, model=None, **kwargs):
        torch.manual_seed(0)  # of the order of the samples
        model = str(checkpoint()) if model is None else model
        return oneshot(
            model=model, dataset=texts, recipe=recipe, num_calibration_samples=16, max_seq_length=32, **kwargs
        )

    return run


@pytest.fixture(scope="module")
def losses(run):
    """Function from names of modifiers, ELSA the last, to its losses in a recipe of these alone."""
    known = {}

    def losses(names, sparsity):
        if (names, sparsity) not in known:
            recipe = Case((*names[:-1], "ELSA")).recipe()
            recipe[-1].sparsity = sparsity
            run(recipe)
            known[names, sparsity] = [record.loss for record in recipe[-1].history]
        return known[names, sparsity]

    return losses


def elsas(recipe):
    return [modifier for modifier in recipe if isinstance(modifier, ELSAModifier)]


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def quantize(cls, group_size=16, **fields):
    groups = {"w4": {"targets": ["Linear"], "weights": W4 | {"group_size": group_size}}}
    return cls(config_groups=groups, ignore=["lm_head"], **fields)


def assert_pruned(model, elsa, *, quantized):
    for name, module in linears(model).items():
        mask = elsa.masks[name]
        assert int((~mask).sum()) == round(elsa.sparsity * mask.numel())
        assert int((module.weight[~mask] != 0).sum()) == 0, name
        assert quantized or torch.equal(module.weight != 0, mask), name


def assert_on_grid(model, *, rounded):
    for name, module in linears(model).items():
        args = module.quantization_scheme.weights
        assert (args.num_bits, args.group_size) == (4, 16)
        error = (forward_quantize(module, module.weight.data, "weight", args) - module.weight.data).abs()
        steps = module.weight_scale.repeat_interleave(16, dim=1)
        # QuantizationModifier rounds when the model is saved; its scales must be those of the weights as they are now.
        assert bool((error <= (1e-3 if rounded else 0.505) * steps).all()), name


@pytest.mark.parametrize("case", [*PAIRS, *TRIPLES], ids=str)
def test_right_or_refused(case, run, losses):
    recipe = case.recipe()
    trained = elsas(recipe)
    if case.refused:
        with pytest.raises(ValueError, match=case.refused):
            run(recipe)
        assert all(elsa.history == [] for elsa in trained)
        return
    model = run(recipe)
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.arange(16).view(1, 16)).logits).all())
    for place, modifier in enumerate(recipe):
        if modifier in trained:
            found = [record.loss for record in modifier.history]
            if "AWQ" in case.names[:place]:
                # AWQ needs a quantizer after it. It changes no output, and so not the first loss.
                assert found[0] == pytest.approx(losses(("ELSA",), 0.8)[0], rel=1e-4)
            else:
                # SparseGPT inverts a Hessian of few samples, and is not the same to the last bit at every address.
                exact = "SparseGPT" not in case.names[:place]
                assert found == pytest.approx(
                    losses(case.names[: place + 1], modifier.sparsity), rel=0 if exact else 0.01
                )
    last = case.names[-1]
    if trained:
        assert_pruned(model, trained[-1], quantized=last in QUANTIZERS)
    elif PRUNERS.keys() & set(case.names):
        assert all(float((m.weight == 0).float().mean()) >= 0.5 for m in linears(model).values())
    if last in QUANTIZERS:
        assert_on_grid(model, rounded=last != "QuantizationModifier")
    else:
        assert not any(hasattr(module, "quantization_scheme") for module in model.modules())


def test_the_document_is_current():
    assert DOCUMENT.read_text() == composition.document(), "run python -m tests.quantization.composition"


def test_a_smaller_sparsity_after_a_larger_one(run):
    recipe = [ELSAModifier(sparsity=sparsity, **QUICK) for sparsity in (0.8, 0.5)]
    assert_pruned(run(recipe), recipe[1], quantized=False)


def test_two_runs_of_pruning_are_saved_as_the_last_asks(run, tmp_path):
    """And recipe.yaml has both, though llm-compressor writes one modifier of a type in each group."""
    recipe = [
        ELSAModifier(sparsity=0.5, **QUICK, checkpoint="bitmask"),
        ELSAModifier(sparsity=0.8, **QUICK, checkpoint="coded"),
    ]
    first = run(recipe, output_dir=str(tmp_path / "out"))
    saved = dict(load_sparse(tmp_path / "out").named_parameters())
    assert all(torch.equal(saved[name], value) for name, value in first.named_parameters())
    again = run(str(tmp_path / "out" / "recipe.yaml"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    recipe = [ELSAModifier(sparsity=s, **QUICK) for s in (0.5, 0.8)]
    recipe.append(MaskedGPTQModifier(scheme="W8A16", ignore=["lm_head"]))
    run(recipe, output_dir=str(tmp_path / "quantized"))
    run(str(tmp_path / "quantized" / "recipe.yaml"), output_dir=str(tmp_path / "again"))
    saved, again = (load_file(tmp_path / name / "model.safetensors") for name in ("quantized", "again"))
    assert saved.keys() == again.keys() and all(torch.equal(value, again[name]) for name, value in saved.items())


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            lambda: [WandaPruningModifier(sparsity=0.5), ELSAModifier(sparsity=0.8, **QUICK)],
            "WandaPruningModifier prunes lm_head, which ELSAModifier after it trains but does not prune",
        ),
        (
            lambda: [
                ELSAModifier(sparsity=0.5, **QUICK),
                ELSAModifier(sparsity={"re:.*mlp.*": 0.8}, **QUICK),
            ],
            "ELSAModifier prunes model.layers.0.self_attn.k_proj and 7 more, which ELSAModifier after it trains",
        ),
        (
            lambda: [ELSAModifier(sparsity=0.8, **QUICK), GPTQModifier(ignore=["lm_head"])],
            "GPTQModifier has no weight to quantize: set scheme",
        ),
        (
            lambda: [
                ELSAModifier(sparsity=0.8, **QUICK),
                quantize(GPTQModifier),
                QuantizationModifier(kv_cache_scheme=W4 | {"strategy": "tensor", "group_size": None, "num_bits": 8}),
            ],
            "GPTQModifier and QuantizationModifier both quantize",
        ),
    ],
    ids=["head", "fewer", "nothing", "kv-cache"],
)
def test_refused_by_what_they_touch(recipe, message, run):
    recipe = recipe()
    with pytest.raises(ValueError, match=message):
        run(recipe)
    assert all(elsa.history == [] for elsa in elsas(recipe))


def test_modifiers_of_different_weights_may_stand_together(run):
    elsa = ELSAModifier(sparsity=0.8, targets=["re:.*mlp.*_proj"], **QUICK)
    mlp, attention = ({"w4": {"targets": [t], "weights": W4}} for t in ("re:.*mlp.*_proj", "re:.*self_attn.*_proj"))
    recipe = [
        elsa,
        WandaPruningModifier(sparsity=0.5, targets=["re:.*self_attn.*_proj"]),
        GPTQModifier(config_groups=mlp),
        QuantizationModifier(config_groups=attention),
    ]
    model = run(recipe)
    for name, module in linears(model).items():
        if name in elsa.masks:
            assert int((module.weight[~elsa.masks[name]] != 0).sum()) == 0
        else:
            assert float((module.weight == 0).float().mean()) == 0.5
    assert_on_grid(model, rounded=False)


def test_experts_are_not_numbered_anew_after_pruning(load, run):
    elsa = ELSAModifier(sparsity=0.8, **QUICK)
    with pytest.raises(ValueError, match="REAPPruningModifier removes experts"):
        run([elsa, REAPPruningModifier(sparsity=0.5)], load("qwen3-moe"))
    assert elsa.history == []


def test_one_pipeline_for_all_modifiers(run):
    """It trains at its start, whatever comes before ELSAModifier in the recipe."""
    elsa = ELSAModifier(sparsity=0.8, **QUICK)
    model = run([elsa, quantize(GPTQModifier)], pipeline="sequential")
    assert_pruned(model, elsa, quantized=True)
    assert_on_grid(model, rounded=True)
    wanda, elsa = WandaPruningModifier(sparsity=0.5, ignore=["re:.*lm_head"]), ELSAModifier(sparsity=0.8, **QUICK)
    with pytest.raises(ValueError, match="would choose a second mask"):
        run([wanda, elsa], pipeline="sequential")
    assert elsa.history == []


def _narrow(tmp_path, tokenizer):
    config = copy.deepcopy(CONFIGS["llama"])
    config.intermediate_size = 36
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("recipe", "size"),
    [
        (lambda: [GPTQModifier(scheme="W4A16", ignore=["lm_head"])], 128),
        (lambda: [QuantizationModifier(scheme="W4A16", ignore=["lm_head"])], 128),
        (lambda: [AWQModifier(), QuantizationModifier(scheme="W4A16_ASYM", ignore=["lm_head"])], 128),
        (lambda: [SmoothQuantModifier(), GPTQModifier(scheme="W4A16", ignore=["lm_head"])], 128),
        (lambda: [quantize(GPTQModifier, 20)], 20),
        (lambda: [quantize(GPTQModifier, 20, bypass_divisibility_checks=True)], 20),
        (lambda: [quantize(QuantizationModifier, 20, bypass_divisibility_checks=True)], 20),
        (lambda: [quantize(MaskedGPTQModifier, 20)], 20),
        # Not even 16 divides 36.
        (lambda: [MaskedGPTQModifier(scheme="W4A16", ignore=["lm_head"])], 128),
    ],
)
@pytest.mark.parametrize("before", ["", "SmoothQuant"])
def test_groups_that_do_not_divide_a_width_are_found_before_training(recipe, size, before, run, tokenizer, tmp_path):
    elsa = ELSAModifier(sparsity=0.8, **QUICK)
    first = [SmoothQuantModifier()] if before else []
    with pytest.raises(
        ValueError, match=rf"group_size of \w+ is {size}, which does not divide the \d+ columns of model"
    ):
        run([*first, elsa, *recipe()], _narrow(tmp_path, tokenizer))
    assert elsa.history == []


def test_a_scheme_is_checked_against_its_own_modules_alone(run):
    """24 divides 48, the width of down_proj, and not 32."""
    groups = {
        "wide": {"targets": ["re:.*down_proj"], "weights": W4 | {"group_size": 24}},
        "others": {"targets": ["Linear"], "weights": W4},
    }
    elsa = ELSAModifier(sparsity=0.8, **QUICK)
    model = run([elsa, GPTQModifier(config_groups=groups, ignore=["lm_head"])])
    assert_pruned(model, elsa, quantized=True)
    assert model.model.layers[0].mlp.down_proj.weight_scale.shape == (32, 2)


class _Interrupted(Exception):
    pass


@pytest.mark.parametrize("where", ["refused", "training", "calibration", "quantizing"])
def test_gptq_of_the_next_run_is_llm_compressor_s(where, run, pruned_checkpoint, monkeypatch):
    """The model is pruned, and so the two rules differ on it."""

    def weights(cls=GPTQModifier):
        return {n: m.weight for n, m in linears(run([quantize(cls)], str(pruned_checkpoint))).items()}

    stock, ours = weights(), weights(MaskedGPTQModifier)
    assert not any(torch.equal(stock[name], ours[name]) for name in stock)

    def fail(*_, **__):
        raise _Interrupted

    recipe = [ELSAModifier(sparsity=0.8, **QUICK), quantize(GPTQModifier)]
    with monkeypatch.context() as patch:
        if where == "refused":
            recipe.append(quantize(QuantizationModifier))
        elif where == "training":
            patch.setattr("elsa_modifier.training.run.train", fail)
        elif where == "calibration":
            patch.setattr(GPTQModifier, "calibrate_module", fail)
        else:
            patch.setattr("elsa_modifier.quantization.modifier.coordinate_descent", fail)
        with pytest.raises((_Interrupted, ValueError)):
            run(recipe)
        assert gptq_base.quantize_weight is llmcompressor_gptq._original
    again = weights()
    assert all(torch.equal(stock[name], again[name]) for name in stock)
    # A modifier of the failed run, if it has been touched, cannot be in another.
    assert "compress_module_list" not in recipe[1].__dict__ or recipe[1].initialized
    assert "compress_module_list" not in GPTQModifier.__dict__["compress_module_list"].__dict__


@pytest.mark.parametrize("sparsities", [(0.8,), (0.5, 0.8)])
def test_gptq_keeps_zeros_and_is_left_as_it_was(sparsities, run):
    """Not by setting them to zero at the end: the others make up for them, as under MaskedGPTQModifier."""
    models = []
    for cls in (GPTQModifier, MaskedGPTQModifier):
        recipe = [*(ELSAModifier(sparsity=s, **QUICK) for s in sparsities), quantize(cls)]
        models.append(linears(run(recipe)))
        assert "compress_module_list" not in recipe[-1].__dict__
    assert all(torch.equal(module.weight, models[1][name].weight) for name, module in models[0].items())


def test_little_memory_and_static_scales_between_other_modifiers(run):
    """Scales that nothing has been written to are not trained, and come back for what they are later."""
    elsa = ELSAModifier(
        **QUICK
        | dict(sparsity=0.8, precision="bf16", weight_dtype="bf16", optimizer="adam8bit_sr", max_grad_norm=None),
        # The first gradients towards a teacher that is the model itself are rounding alone.
        objective="next_token",
        gradient_release=True,
    )
    static = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True, "dynamic": False}
    groups = {"w4a8": {"targets": ["Linear"], "weights": W4, "input_activations": static}}
    quantizer = QuantizationModifier(config_groups=groups, kv_cache_scheme=static, ignore=["lm_head"])
    wanda = WandaPruningModifier(sparsity=0.5, ignore=["re:.*lm_head"])
    model = run([wanda, elsa, quantizer])
    assert_pruned(model, elsa, quantized=True)
    assert_on_grid(model, rounded=False)
    alone = ELSAModifier(**elsa.model_dump(exclude={"initialized_", "finalized_", "started_", "ended_"}))
    run([WandaPruningModifier(sparsity=0.5, ignore=["re:.*lm_head"]), alone])
    # Modules with a scheme multiply by code of their own, which some processors round otherwise in bf16; from the
    # second step on, 8-bit moments and stochastic rounding make much of that.
    assert len(alone.history) == len(elsa.history)
    assert alone.history[0].loss == pytest.approx(elsa.history[0].loss, rel=2e-3)
    for attention in (layer.self_attn for layer in model.model.layers):
        assert all(float(getattr(attention, f"{name}_scale")) > 0 for name in ("k", "v"))


def test_a_diverged_run_leaves_quantization_as_it_was(load, run):
    model = load()
    # Finite, as what is not is refused before; no longer after a product.
    model.model.norm.weight.data[0] = 3e38
    with pytest.raises(TrainingDiverged):
        run([ELSAModifier(sparsity=0.8, **QUICK), quantize(QuantizationModifier)], model)
    assert not any(module.quantization_enabled for module in model.modules())
