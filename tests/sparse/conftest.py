import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from elsa_sparse.checkpoint import CONFIG_FILE
from elsa_sparse.writing import save_sparse
from tests.conftest import CONFIGS


def prune(model, sparsity=0.8):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.masked_fill_(torch.rand(parameter.shape, generator=generator) < sparsity, 0.0)
    return model


@pytest.fixture(scope="session")
def pruned(tmp_path_factory, tokenizer):
    """Function from the name of a configuration to a dense checkpoint of a pruned random model of it, in bf16."""
    made = {}

    def make(name="llama", **fields):
        key = (name, *fields.items())
        if key not in made:
            torch.manual_seed(0)
            directory = tmp_path_factory.mktemp("pruned") / name
            config = type(CONFIGS[name]).from_dict(CONFIGS[name].to_dict() | fields)
            prune(AutoModelForCausalLM.from_config(config)).to(torch.bfloat16).save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            made[key] = directory
        return made[key]

    return make


@pytest.fixture
def sparse(tmp_path, pruned):
    """Function to a sparse checkpoint of the same, the caller's own."""

    def make(name="llama", **options):
        out = tmp_path / "sparse"
        save_sparse(pruned(name), out, progress=False, **options)
        return out

    return make


@pytest.fixture
def edit_config():
    """Function that changes a checkpoint's config.json with a function of its content."""

    def edit(directory, change):
        file = directory / CONFIG_FILE
        config = json.loads(file.read_text())
        change(config)
        file.write_text(json.dumps(config))

    return edit
