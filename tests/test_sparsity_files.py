import pytest
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM

from elsa_modifier import ELSAModifier, sparsity_mapping

Q0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture
def mapping(checkpoint, tmp_path):
    """Function from the text of a file, and options, to the mapping for a tiny Llama."""

    def read(text, name="llama", **options):
        file = tmp_path / "chosen.txt"
        file.write_text(text)
        return sparsity_mapping(file, checkpoint(name), **options)

    return read


def test_levels_of_evopress_are_zeros_more_or_fewer_than_the_sparsity_they_vary(mapping):
    # 32 x 32 and 32 x 48 weights; 64 of them a level.
    fractions = mapping(f"{Q0}: -2\n{DOWN1}: 3", sparsity=0.7, weights_diff=64)
    assert fractions == pytest.approx({Q0: 0.7 - 128 / 1024, DOWN1: 0.7 + 192 / 1536})


def test_fractions_by_module(mapping):
    assert mapping(f"\n{Q0}: 0.5\n{DOWN1}: 0\n") == {Q0: 0.5, DOWN1: 0.0}
    assert mapping(f"{Q0}: 0.25\n{DOWN1}: 0.5\n", kept=True) == {Q0: 0.75, DOWN1: 0.5}


@pytest.mark.parametrize("text", ["[0.5, 0.75]", "[0.5 0.75]", "0.5\n0.75\n"])
def test_one_number_for_each_layer_holds_for_all_its_linears(mapping, text):
    fractions = mapping(text)
    assert len(fractions) == 14
    assert {value for name, value in fractions.items() if name.startswith("model.layers.0.")} == {0.5}
    assert {value for name, value in fractions.items() if name.startswith("model.layers.1.")} == {0.75}
    assert mapping(text, kept=True)[DOWN1] == 0.25
    assert set(mapping(text, name="opt")) > {"model.decoder.layers.1.fc1"}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            f"{Q0}: 0.5\nmodel.layers.0.nowhere: 0.5",
            {},
            r"line 2 \('model.layers.0.nowhere: 0.5'\): the model has no mod",
        ),
        ("model.norm: 0.5", {}, "no module of this name that has a weight matrix"),
        (f"{Q0}: half", {}, r"line 1 \('.*q_proj: half'\) is not `module: number`"),
        (f"{Q0}: nan", {}, "is not `module: number`"),
        (f"{Q0}: 0.5\nnonsense", {}, r"line 2 \('nonsense'\) is not `module: number`"),
        (f"{Q0}: 0.5\n\n{Q0}: 0.6", {}, r"line 3 .*: the module was in line 1 already"),
        (f"{Q0}: 1.5", {}, r"line 1 .* makes a sparsity of 1.5; allowed is 0 <= sparsity < 1"),
        (f"{Q0}: 0.5\n{DOWN1}: -0.1", {}, r"line 2 .* makes a sparsity of -0.1"),
        (f"{Q0}: 5", {"sparsity": 0.7, "weights_diff": 64}, "line 1 .* makes a sparsity of 1.0125"),
        (f"{Q0}: 1", {}, "holds EvoPress's levels, which are no fractions; give sparsity and weights_diff"),
        (f"{Q0}: 1", {"sparsity": 0.7}, "holds EvoPress's levels"),
        (f"{Q0}: 0.5", {"sparsity": 0.7, "weights_diff": 64}, "holds fractions, .* leave them out"),
        ("[0.5, 0.6, 0.7]", {}, "holds 3 numbers, and the model has 2 decoder layers"),
        ("", {}, "holds 0 numbers"),
        ("[0.5, 1.0]", {}, r"number 2 \(1.0\) makes a sparsity of 1;"),
        ("[0.5, x]", {}, "holds 'x'; allowed are a list of numbers"),
    ],
)
def test_what_is_refused(mapping, text, options, message):
    with pytest.raises(ValueError, match=message):
        mapping(text, **options)


def test_the_mapping_is_what_the_modifier_takes(mapping, checkpoint, texts):
    fractions = mapping("[0.25, 0.75]")
    modifier = ELSAModifier(sparsity=fractions, steps=4, batch_size=2, sequence_length=16)
    model = oneshot(model=str(checkpoint("llama")), dataset=texts, recipe=[modifier])
    for name, fraction in fractions.items():
        weight = model.get_submodule(name).weight
        assert int((weight == 0).sum()) == round(fraction * weight.numel())


def test_a_model_in_memory_will_do(checkpoint, tmp_path):
    file = tmp_path / "chosen.txt"
    file.write_text(f"{Q0}: 0.5")
    assert sparsity_mapping(file, AutoModelForCausalLM.from_pretrained(checkpoint("llama"))) == {Q0: 0.5}
