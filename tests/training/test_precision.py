"""What ``precision: auto`` means, and in what the teacher is held."""

from pathlib import Path

import pytest
import torch

from elsa_modifier.training import precision
from elsa_modifier.training.distillation import copy_as_teacher
from elsa_modifier.training.precision import multiplies_bf16, precision_on
from tests.training.test_objective import build

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False])
def fast(request, monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: request.param)
    return request.param


def test_auto_is_bf16_only_where_it_is_multiplied(fast):
    assert precision_on(CPU, "auto") == ("bf16" if fast else "fp32")
    assert precision_on(CPU, "auto", weights=torch.bfloat16) == "bf16"
    assert [precision_on(CPU, field) for field in ("bf16", "fp32")] == ["bf16", "fp32"]


def test_a_teacher_takes_half_the_memory_only_where_it_costs_no_time(fast):
    matrices = {p.dtype for p in copy_as_teacher(build("llama")).parameters() if p.ndim > 1}
    assert matrices == {torch.bfloat16 if fast else torch.float32}


def test_this_processor_is_asked():
    """With AVX-512 or more it multiplies bf16; without, torch takes many times as long (6 here)."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "avx2" not in flags:
        pytest.skip("no x86 Linux, where the processor says what it can")
    assert multiplies_bf16(CPU) == ("avx512bw" in flags)
