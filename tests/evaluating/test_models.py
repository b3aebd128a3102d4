import pytest
import torch

from elsa_modifier.evaluating import models
from elsa_modifier.evaluating.models import load_model


@pytest.fixture
def directory(load, tmp_path):
    load(dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    return str(tmp_path / "bf16")


@pytest.mark.parametrize("multiplies", [True, False])
def test_bf16_stays_where_it_is_multiplied_and_where_it_is_asked_for(directory, multiplies, monkeypatch):
    monkeypatch.setattr(models, "multiplies_bf16", lambda device: multiplies)
    assert load_model(directory, device="cpu").dtype == (torch.bfloat16 if multiplies else torch.float32)
    assert load_model(directory, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
