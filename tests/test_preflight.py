"""What is refused before the first step, in the real ``oneshot`` but where a function says it sooner."""

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier

from elsa_modifier import ELSAModifier
from elsa_modifier.preflight import check_values, refuse_launchers, refuse_unmatched
from tests.test_modifier import QUICK, assert_pruned

LAYER = "model.layers.0.mlp.up_proj"


def elsa(**fields):
    return ELSAModifier(**({"sparsity": 0.9} | QUICK | fields))


@pytest.fixture
def refused(load, texts):
    """Function that expects a run to be refused with a message, and the model to be as it was."""

    def refused(message, model=None, **fields):
        model = load() if model is None else model
        before = {name: value.clone() for name, value in model.state_dict().items()}
        modifier = elsa(**fields)
        with pytest.raises(ValueError, match=message):
            oneshot(model=model, dataset=texts, recipe=[modifier])
        assert modifier.history == []
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]) or value.isnan().any()

    return refused


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_launcher_is_refused(name, refused, monkeypatch):
    monkeypatch.setenv(name, "2")
    refused(f"^{name} is 2, and RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT")


def test_one_process_is_no_launcher():
    refuse_launchers({})
    refuse_launchers({"WORLD_SIZE": "1", "LOCAL_RANK": "0", "SLURM_NTASKS": "8", "PMI_SIZE": ""})


def test_torchrun_is_none_that_is_refused():
    """Nor is it under srun, which starts one torchrun on each machine."""
    torchrun = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    refuse_launchers(torchrun | {"SLURM_STEP_NUM_TASKS": "2"})


@pytest.mark.parametrize("field", ["targets", "ignore"])
@pytest.mark.parametrize(
    "entry,near",
    [
        ("model.layers.0.mlp.upproj", "model.layers.0.mlp.up_proj"),
        ("re:model.layers.0.mlp.upproj", "model.layers.0.mlp.up_proj"),
        ("Linaer", "Linear"),
        ("re:mlp", "model.layers.0.mlp"),  # not from the name's beginning
        ("up_proj", "model.layers.0.mlp.up_proj"),
    ],
)
def test_an_entry_that_matches_nothing_is_refused(field, entry, near, refused):
    entries = [entry, *{"targets": ["Linear"], "ignore": ["lm_head"]}[field]]
    refused(
        rf"{field} has entries that match no module of the model: '{entry}' \(the model has .*{near}",
        **{field: entries},
    )


def test_lm_head_may_be_ignored_where_the_head_has_another_name():
    model = torch.nn.ModuleDict({"embed_out": torch.nn.Linear(2, 2)})
    refuse_unmatched(model, targets=["Linear"], ignore=["lm_head", "embed_out"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", f"{LAYER}.weight", "model.norm.weight"])
def test_a_weight_that_is_not_finite_is_named(name, value, load, refused):
    model = load()
    model.get_parameter(name).data.view(-1)[3] = value
    refused(f"NaN or infinite before the first step, in {name}: load it anew", model)


def test_buffers_may_be_infinite_but_not_nan(load):
    model = load("llama", torch.bfloat16)
    model.register_buffer("causal", torch.full((4, 4), -float("inf")).triu(1))
    model.register_buffer("none", torch.empty(0))
    check_values(model)
    model.causal[0, 0] = float("nan")
    with pytest.raises(ValueError, match="in causal:"):
        check_values(model)


def test_many_broken_weights_are_counted(load):
    model = load()
    for parameter in model.parameters():
        parameter.data.view(-1)[0] = float("nan")
    with pytest.raises(
        ValueError, match=f"layers.0.self_attn.o_proj.weight and {len(list(model.parameters())) - 5} more"
    ):
        check_values(model)


def test_frozen_targets_are_refused(load, refused):
    model = load()
    model.get_submodule(LAYER).weight.requires_grad_(False)
    refused(f"targets matches {LAYER}, whose weights are frozen.*list them in ignore", model)


class Renewing(Modifier):
    """Makes a parameter anew, as modifiers of llm-compressor do, which requires no gradient then."""

    def on_initialize(self, state, **kwargs):
        return True

    def on_calibration_start(self, state, event, **kwargs):
        norm = state.model.model.layers[0].input_layernorm
        norm.weight = torch.nn.Parameter(norm.weight.data.clone(), requires_grad=False)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(gradient_release=True, max_grad_norm=None),
        dict(optimizer="adam8bit_sr", weight_dtype="bf16", precision="bf16", state_dtype="int8"),
    ],
    ids=["fp32", "released", "bf16"],
)
def test_what_the_user_froze_stays_as_it_is(name, fields, load, texts):
    model = load(name)
    frozen = ["model.embed_tokens.weight", f"{LAYER}.weight", "model.norm.weight"]
    for parameter in frozen:
        model.get_parameter(parameter).requires_grad_(False)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    modifier = elsa(ignore=["lm_head", LAYER], **fields)
    model = oneshot(model=model, dataset=texts, recipe=[Renewing(), modifier])
    after = dict(model.named_parameters())
    for parameter in frozen:
        assert torch.equal(after[parameter], before[parameter]), parameter
        assert not after[parameter].requires_grad
    assert not torch.equal(
        after["model.layers.0.input_layernorm.weight"], before["model.layers.0.input_layernorm.weight"]
    )
    assert len(modifier.masks) == 13


def test_a_frozen_offloaded_model(load, texts):
    from compressed_tensors.offload import set_onload_device

    model = load("llama-tied")
    model.model.embed_tokens.weight.requires_grad_(False)
    before = model.model.embed_tokens.weight.detach().clone()
    model = oneshot(model=set_onload_device(model, "cpu"), dataset=texts, recipe=[elsa()])
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert torch.equal(model.lm_head.weight, before)
    assert_pruned(model, 0.9)


def test_a_model_with_a_device_map(load, texts):
    from accelerate import dispatch_model

    plain = oneshot(model=load(), dataset=texts, recipe=[elsa()])
    places = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.rotary_emb": "cpu"}
    spread = dispatch_model(load(), places, main_device="cpu", force_hooks=True)
    assert spread.lm_head._hf_hook is not None
    pruned = oneshot(model=spread, dataset=texts, recipe=[elsa()])
    assert_pruned(pruned, 0.9)
    assert torch.equal(pruned.lm_head.weight, plain.lm_head.weight)
