import inspect
import json

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.gptq import base as gptq_base
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import AWQModifier, QuIPModifier, SpinQuantModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM

from elsa_modifier import ELSAModifier, MaskedGPTQModifier, save_sparse
from elsa_modifier.quantization import llmcompressor_gptq, modifier

ELSA = {"sparsity": 0.8, "steps": 4, "batch_size": 2, "sequence_length": 16, "shared_budget": False}
_INT = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
_INT4 = _INT | {"num_bits": 4, "strategy": "group", "group_size": 16}
_FP8 = _INT | {"type": "float"}
_TOKEN = {"strategy": "token", "dynamic": True}
SCHEMES = {
    "W4A16": {"weights": _INT4},
    "W4A16_ASYM": {"weights": _INT4 | {"symmetric": False}},
    "W8A16": {"weights": _INT},
    "W8A8": {"weights": _INT, "input_activations": _INT | _TOKEN},
    "FP8_DYNAMIC": {"weights": _FP8, "input_activations": _FP8 | _TOKEN},
}


def quantizer(cls, scheme, **fields):
    return cls(config_groups={"group_0": {"targets": ["Linear"], **SCHEMES[scheme]}}, ignore=["lm_head"], **fields)


def run(checkpoint, texts, recipe, **kwargs):
    torch.manual_seed(0)  # of the order of the samples
    return oneshot(
        model=str(checkpoint), dataset=texts, recipe=recipe, num_calibration_samples=16, max_seq_length=32, **kwargs
    )


def pruned_weights(model):
    return {n: p for n, p in model.named_parameters() if "_proj.weight" in n and not n.endswith(("_scale", "_point"))}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("cls", [GPTQModifier, QuantizationModifier])
def test_no_pruned_weight_comes_back(scheme, cls, checkpoint, texts, tmp_path):
    """In the model, and in what is saved once it is decompressed."""
    elsa = ELSAModifier(**ELSA)
    model = run(checkpoint(), texts, [elsa, quantizer(cls, scheme)], output_dir=str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    saved = dict(loaded.named_modules())
    ids = torch.arange(16).view(1, 16)
    with torch.no_grad():
        loaded(ids)  # decompresses
    for name, mask in elsa.masks.items():
        weight = dict(model.named_modules())[name].weight if not hasattr(saved[name], "weight") else saved[name].weight
        assert weight.shape == mask.shape
        assert int((weight[~mask].float() != 0).sum()) == 0, name
        assert int((weight[mask].float() != 0).sum()) > 0.5 * int(mask.sum())


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "FP8_DYNAMIC"])
def test_rows_that_keep_most_of_their_weights(scheme, checkpoint, texts):
    """They start from GPTQ's usual factor, which would bring pruned weights back."""
    elsa = ELSAModifier(**ELSA | {"sparsity": 0.3})
    model = run(checkpoint(), texts, [elsa, quantizer(GPTQModifier, scheme)])
    for name, mask in elsa.masks.items():
        assert float(mask.float().mean()) > modifier._OWN_FACTORS
        weight = dict(model.named_modules())[name].weight
        assert int((weight[~mask] != 0).sum()) == 0, name
        assert int((weight[mask] != 0).sum()) > 0.5 * int(mask.sum())


@pytest.mark.parametrize(
    "recipe",
    [
        lambda: [SmoothQuantModifier(smoothing_strength=0.5), quantizer(GPTQModifier, "W8A8")],
        lambda: [AWQModifier(n_grid=4), quantizer(QuantizationModifier, "W4A16_ASYM")],
    ],
    ids=["smoothquant", "awq"],
)
def test_what_scales_keeps_zeros(recipe, checkpoint, texts, monkeypatch):
    # llm-compressor 0.14 pins memory for AWQ even where there is no accelerator to pin it for.
    monkeypatch.setattr(IntermediatesCache, "pin_memory", lambda *_, **__: None)
    elsa = ELSAModifier(**ELSA)
    model = run(checkpoint(), texts, [elsa, *recipe()])
    for name, mask in elsa.masks.items():
        weight = dict(model.named_modules())[name].weight
        assert int((weight[~mask] != 0).sum()) == 0, name


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_masked_gptq_alone_keeps_the_zeros_of_a_pruned_checkpoint(kind, pruned_checkpoint, texts, tmp_path):
    before = {n: p != 0 for n, p in pruned_weights(AutoModelForCausalLM.from_pretrained(pruned_checkpoint)).items()}
    source = pruned_checkpoint
    if kind == "sparse":
        source = tmp_path / "sparse"
        save_sparse(pruned_checkpoint, source, progress=False)
    model = run(source, texts, [quantizer(MaskedGPTQModifier, "W4A16")])
    weights = dict(model.named_parameters())
    assert before and all(int((weights[n][~mask] != 0).sum()) == 0 for n, mask in before.items())


def test_stock_gptq_would_bring_them_back(pruned_checkpoint, texts):
    """What the tests above guard against is there without this package's rule."""
    before = {n: p != 0 for n, p in pruned_weights(AutoModelForCausalLM.from_pretrained(pruned_checkpoint)).items()}
    model = run(pruned_checkpoint, texts, [quantizer(GPTQModifier, "FP8_DYNAMIC")])
    weights = dict(model.named_parameters())
    assert sum(int((weights[n][~mask] != 0).sum()) for n, mask in before.items()) > 1000


def test_dense_weights_are_stock_gptq_s(checkpoint, texts):
    stock, ours = (
        run(checkpoint(), texts, [quantizer(cls, "W4A16")]).state_dict() for cls in (GPTQModifier, MaskedGPTQModifier)
    )
    assert stock.keys() == ours.keys() and all(torch.equal(stock[name], ours[name]) for name in stock)


@pytest.mark.parametrize("rotation", [QuIPModifier, SpinQuantModifier])
def test_rotations_are_refused_before_the_first_step(rotation, checkpoint, texts):
    elsa = ELSAModifier(**ELSA)
    with pytest.raises(ValueError, match=f"{rotation.__name__} rotates weights.*Take it out of the recipe"):
        run(checkpoint(), texts, [elsa, rotation()])
    assert elsa.history == []


def test_gptq_is_its_own_again_afterwards(checkpoint, texts):
    stock = gptq_base.quantize_weight
    run(checkpoint(), texts, [ELSAModifier(**ELSA), quantizer(GPTQModifier, "W8A16")])
    assert gptq_base.quantize_weight is stock is llmcompressor_gptq._original


def test_internals_have_not_moved(monkeypatch):
    """Fails when a new llm-compressor moves what this package touches, with a message that says what."""
    llmcompressor_gptq.check_internals()
    source = inspect.getsource(gptq_base.GPTQModifier.compress_module_list)
    assert "quantize_weight(" in source
    monkeypatch.setitem(llmcompressor_gptq._PARAMETERS, "quantize_weight", ["weights"])
    with pytest.raises(RuntimeError, match=r"changed llmcompressor\.modifiers\.gptq\.base\.quantize_weight: it takes"):
        llmcompressor_gptq.check_internals()


def test_a_hessian_that_cannot_be_factored_falls_back_to_rounding(checkpoint, texts):
    elsa = ELSAModifier(**ELSA)
    recipe = [elsa, quantizer(GPTQModifier, "W4A16", dampening_frac=0.0)]
    model = oneshot(model=str(checkpoint()), dataset=texts, recipe=recipe, num_calibration_samples=1, max_seq_length=8)
    for name, mask in elsa.masks.items():
        weight = dict(model.named_modules())[name].weight
        assert bool(torch.isfinite(weight).all()) and int((weight[~mask] != 0).sum()) == 0


def test_groups_of_presets_fit_the_model(checkpoint, texts, tmp_path):
    """128 divides none of this model's widths (32 and 48)."""
    model = run(checkpoint(), texts, [MaskedGPTQModifier(scheme="W4A16", ignore=["lm_head"])], output_dir=str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 16
    assert model.model.layers[0].mlp.down_proj.weight_scale.shape == (32, 3)


def test_groups_that_are_named_are_taken_as_they_are(checkpoint, texts):
    groups = {"group_0": {"targets": ["Linear"], "weights": _INT4 | {"group_size": 20}}}
    elsa = ELSAModifier(**ELSA)
    with pytest.raises(ValueError, match="group_size"):
        run(checkpoint(), texts, [elsa, MaskedGPTQModifier(config_groups=groups, ignore=["lm_head"])])
    assert elsa.history == []
