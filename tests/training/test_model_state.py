import pytest
import torch
from transformers import AutoModelForCausalLM

from elsa_modifier.training.model_state import trainable
from tests.conftest import CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_weights_have_fp32_vectors_and_an_fp32_residual_stream(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], experts_implementation="eager")
    ids = torch.randint(2, 96, (2, 16))
    exact = model(input_ids=ids, labels=ids).loss.detach()
    with trainable(model, torch.device("cpu"), dtype=torch.bfloat16):
        for parameter in model.parameters():
            assert parameter.dtype == (torch.bfloat16 if parameter.ndim > 1 else torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            output = model.eval()(input_ids=ids, labels=ids, output_hidden_states=True)
        assert {hidden.dtype for hidden in output.hidden_states} == {torch.float32}
        output.loss.backward()
        assert any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
    torch.testing.assert_close(output.loss.detach(), exact, rtol=0.01, atol=0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.get_input_embeddings()._forward_hooks


def test_frozen_parameters_are_neither_trained_nor_rounded():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama-tied"])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    frozen = {"lm_head.weight", "model.layers.0.mlp.up_proj.weight"}  # the head's is the embedding's, too
    with trainable(model, torch.device("cpu"), dtype=torch.bfloat16, frozen=frozen):
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(before) - trained == {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"}
    for name, parameter in model.named_parameters():
        changed = parameter.ndim > 1 and name in trained
        assert torch.equal(parameter, before[name]) != changed, name
