import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from transformers import AutoModelForCausalLM

from elsa_modifier.quantization.grid import Grid
from tests.sparse.conftest import prune


@pytest.fixture
def pruned_checkpoint(checkpoint, tokenizer, tmp_path):
    """A dense directory of a pruned random model."""
    prune(AutoModelForCausalLM.from_pretrained(checkpoint())).save_pretrained(tmp_path / "pruned")
    tokenizer.save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"


@pytest.fixture
def problem():
    """A weight, a Hessian with correlated inputs, masks from empty to full, a grid with a step for each row, an order.

    Of float64, but for the steps of the grid.
    """
    rows, columns = 12, 20
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, columns, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, columns, generator=generator) < torch.linspace(0, 1, rows)[:, None]
    mask[0], mask[-1] = False, True
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * mask
    steps = torch.linspace(0.1, 0.4, rows).view(rows, 1).expand(rows, columns)
    order = torch.randperm(columns, generator=generator)
    return weight, inputs.T @ inputs, mask, Grid.of(QuantizationArgs(num_bits=4), steps, None), order
