import pytest
from transformers import AutoModelForCausalLM

from tests.sparse.conftest import prune


@pytest.fixture
def pruned_checkpoint(checkpoint, tokenizer, tmp_path):
    """A dense directory of a pruned random model."""
    prune(AutoModelForCausalLM.from_pretrained(checkpoint())).save_pretrained(tmp_path / "pruned")
    tokenizer.save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"
