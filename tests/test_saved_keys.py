"""What is written is what the model's own class looks for, or the run says so."""

import contextlib
import json

import pytest
import torch
from compressed_tensors.offload import set_onload_device
from llmcompressor import oneshot
from llmcompressor.modeling.moe.conversion_mappings import get_linearize_load_mappings, set_save_conversion_mapping
from llmcompressor.modeling.moe.linearize import get_linearized_moes, linearize_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from loguru import logger
from safetensors import safe_open
from transformers import AutoModelForCausalLM, conversion_mapping

from elsa_modifier import ELSAModifier, saving
from elsa_modifier.fused_experts import FusedLayout, fuse, layout_of
from elsa_sparse.transformers_loading import load_sparse

QUICK = dict(sparsity=0.5, steps=3, batch_size=2, sequence_length=16, interval=1, lr=1e-2, precision="fp32")


def saved_keys(directory):
    with safe_open(directory / "model.safetensors", framework="pt") as opened:
        return set(opened.keys())


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(20).view(1, -1)).logits


@pytest.fixture
def warnings():
    found = []
    sink = logger.add(found.append, level="WARNING", format="{message}")
    yield found
    logger.remove(sink)


@pytest.fixture
def tokens(tokenizer, texts):
    return texts.map(lambda row: tokenizer(row["text"]), remove_columns=["text"])


def test_experts_are_written_as_they_came(checkpoint, tokens, tmp_path):
    """Under the names that engines know, and the model in memory still has one Linear of each."""
    model = oneshot(
        model=str(checkpoint("mixtral")), dataset=tokens, recipe=[ELSAModifier(**QUICK)], output_dir=str(tmp_path)
    )
    assert saved_keys(tmp_path) == saved_keys(checkpoint("mixtral"))
    assert isinstance(model.model.layers[0].mlp.experts[0].gate_proj, torch.nn.Linear)
    assert "model.layers.0.mlp.experts.0.gate_proj.weight" in model.state_dict()


@pytest.mark.parametrize("encoding", ["coded", "bitmask"])
def test_experts_in_the_sparse_format(encoding, checkpoint, tokens, tmp_path):
    modifier = ELSAModifier(**QUICK, checkpoint=encoding)
    model = oneshot(model=str(checkpoint("mixtral")), dataset=tokens, recipe=[modifier], output_dir=str(tmp_path))
    torch.testing.assert_close(logits(load_sparse(tmp_path)), logits(model), rtol=0, atol=1e-5)


def test_experts_in_many_files(checkpoint, tokens, tmp_path):
    model = oneshot(model=str(checkpoint("mixtral")), dataset=tokens, recipe=[ELSAModifier(**QUICK)])
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model), rtol=0, atol=1e-5)


def test_experts_of_an_offloaded_model(load, tokens, tmp_path):
    model = set_onload_device(load("mixtral"), "cpu")
    model = oneshot(model=model, dataset=tokens, recipe=[ELSAModifier(**QUICK)], output_dir=str(tmp_path))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model), rtol=0, atol=1e-5)


def test_quantized_experts_are_written_as_llm_compressor_does(checkpoint, tokens, tmp_path, warnings):
    """One by one; and those of a layer that is not quantized as they came."""
    scheme = dict(targets="Linear", scheme="W8A8", ignore=["lm_head", "re:.*mlp.gate$", "re:.*layers.1.mlp.experts.*"])
    keys, ignored = [], []
    for recipe in ([GPTQModifier(**scheme)], [ELSAModifier(**QUICK), GPTQModifier(**scheme)]):
        out = tmp_path / str(len(keys))
        data = dict(dataset=tokens, num_calibration_samples=8)
        oneshot(model=str(checkpoint("mixtral")), **data, recipe=recipe, output_dir=str(out))
        keys.append(saved_keys(out))
        ignored.append(json.loads((out / "config.json").read_text())["quantization_config"]["ignore"])
    assert ignored[0] == ignored[1]
    stem = "model.layers.0.block_sparse_moe.experts.0.up_proj.weight"
    assert {stem, f"{stem}_scale"} <= keys[1]
    one_by_one, as_they_came = (
        {key for key in found if ".layers.1." in key and ".experts." in key}
        for found in (keys[0], saved_keys(checkpoint("mixtral")))
    )
    assert one_by_one and keys[1] == keys[0] - one_by_one | as_they_came
    assert any("Inference engines" in text for text in map(str, warnings))


def test_a_quantized_model_that_reads_back_is_not_warned_of(checkpoint, texts, tmp_path, warnings):
    recipe = [ELSAModifier(**QUICK), GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])]
    oneshot(model=str(checkpoint()), dataset=texts, num_calibration_samples=8, recipe=recipe, output_dir=str(tmp_path))
    assert not any("read back" in text for text in map(str, warnings))


def test_experts_that_were_loaded_one_by_one(checkpoint, tokens, tmp_path, monkeypatch):
    """As llm-compressor's load_quantizable_moe does, which also replaces the conversions of the whole process."""
    monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", None)
    model = linearize_moe(AutoModelForCausalLM.from_pretrained(checkpoint("qwen3-moe")))
    for _, experts in get_linearized_moes(model):
        del experts._source_experts_cls, experts._source_config
    _, _, save_map = get_linearize_load_mappings("qwen3_moe")
    set_save_conversion_mapping(model, save_map)
    conversion_mapping.register_checkpoint_conversion_mapping("qwen3_moe", save_map, overwrite=True)
    model = oneshot(model=model, dataset=tokens, recipe=[ELSAModifier(**QUICK)], output_dir=str(tmp_path))
    assert saved_keys(tmp_path) == saved_keys(checkpoint("qwen3-moe"))
    monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", None)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model), rtol=0, atol=1e-5)


def test_a_model_that_its_class_would_not_read_back_is_refused(load, tokens):
    model = load()
    model.model.layers[0].adapter = torch.nn.Linear(4, 4)
    modifier = ELSAModifier(**QUICK)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM would not .*does not know model.layers.0.adapter.bias, "):
        oneshot(model=model, dataset=tokens, recipe=[modifier])
    assert modifier.history == []


@pytest.mark.parametrize("encoding,error", [("dense", RuntimeError), ("coded", OSError)])
def test_files_that_its_class_would_not_read_are_not_passed_over(
    encoding, error, checkpoint, tokens, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(saving, "fusing_experts", lambda *_: contextlib.nullcontext())
    with pytest.raises(error, match=r"it looks for model.layers.0.mlp.experts.down_proj, .*it does not know"):
        oneshot(
            model=str(checkpoint("mixtral")),
            dataset=tokens,
            recipe=[ELSAModifier(**QUICK, checkpoint=encoding)],
            output_dir=str(tmp_path / "out"),
        )
    assert (tmp_path / "out" / "model.safetensors").exists() == (encoding == "dense")
    assert bool(list(tmp_path.glob("elsa-rescued-*/model.safetensors"))) == (encoding == "coded")


class Interleaved(torch.nn.Module):
    """Two matrices of three experts, the rows of one between those of the other, as a class may hold them."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.randn(3, 4, 10))


class Expert(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (torch.nn.Linear(4, 5, bias=False) for _ in range(2))

    def copy_from_experts_module(self, experts, index):
        self.gate_proj.weight.copy_(experts.gate_up_proj[index][:, 0::2].T)
        self.up_proj.weight.copy_(experts.gate_up_proj[index][:, 1::2].T)


class Experts(torch.nn.ModuleList):
    is_concatenated = is_transposed = has_bias = has_gate = None


@torch.no_grad()
def test_a_layout_is_read_off_and_taken_back():
    fused, experts = Interleaved(), Experts(Expert() for _ in range(3))
    for index, expert in enumerate(experts):
        expert.copy_from_experts_module(fused, index)
    layout = layout_of(experts, fused)
    assert isinstance(layout, FusedLayout)
    state = {f"e.{key}": value for key, value in experts.state_dict().items()}
    fuse(state, "e.", layout)
    assert state.keys() == {"e.gate_up_proj"} and torch.equal(state["e.gate_up_proj"], fused.gate_up_proj)


def losing(self, experts, index):
    self.gate_proj.weight.copy_(experts.gate_up_proj[index][:, 0::2].T)
    self.up_proj.weight.copy_(experts.gate_up_proj[index][:, 0::2].T)


def scaling(self, experts, index):
    Expert.copy_from_experts_module(self, experts, index)
    self.gate_proj.weight.mul_(-1)


def shuffling(self, experts, index):
    Expert.copy_from_experts_module(self, experts, index)
    self.gate_proj.weight.copy_(self.gate_proj.weight[[0, 2, 1, 3, 4]])


@pytest.mark.parametrize("way_in", [losing, scaling, shuffling])
def test_a_layout_that_cannot_be_taken_back_is_refused(way_in):
    kind = type("Other", (Expert,), {"copy_from_experts_module": way_in})
    with pytest.raises(ValueError, match="gate"):
        layout_of(Experts(kind() for _ in range(3)), Interleaved())
