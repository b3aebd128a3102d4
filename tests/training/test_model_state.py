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
