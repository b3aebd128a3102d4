"""Corrupt packed tensors are refused, or computed with without a wrong access."""

import os
import re
import subprocess
from pathlib import Path

import elsa_kernels
import pytest
import torch
from elsa_kernels.layout import Layout, read_header

from tests.kernels.weights import VALUES, pack, sparse_weight

SOURCES = Path(__file__).parents[2] / "kernels"
LAYOUTS = [Layout.CSR, Layout.BITMASK, Layout.WINDOW]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name.lower())


@layouts
@pytest.mark.parametrize("values", VALUES)
def test_random_changes_are_refused_or_give_a_result_of_the_right_shape(values, layout, isa):
    packed = pack(sparse_weight(37, 131, 0.2, uneven=True), layout, values=values)
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(150):
        changed = packed.clone()
        end = packed.numel() if torch.rand((), generator=generator) < 0.5 else 400
        changed[torch.randint(end, (2,), generator=generator)] ^= torch.randint(1, 256, (), generator=generator).byte()
        try:
            elsa_kernels.check(changed)
        except ValueError:
            refused += 1
            continue
        info = elsa_kernels.describe(changed)
        y = torch.ops.elsa_kernels.linear(torch.ones(2, info.columns), changed, info.rows)
        assert y.shape == (2, info.rows)
    assert refused > 30


@layouts
@pytest.mark.parametrize("values", ["bf16", "int4"])
def test_both_checks_agree(values, layout, monkeypatch):
    """The compiled one and torch's, on the same changed tensors."""
    from elsa_kernels import library

    if library.compiled() is None:
        pytest.skip("there is no compiled library")
    packed = pack(sparse_weight(37, 131, 0.2), layout, values=values)
    generator = torch.Generator().manual_seed(1)
    changes = [packed, packed[:-64]]
    for _ in range(150):
        changed = packed.clone()
        end = packed.numel() if torch.rand((), generator=generator) < 0.5 else 600
        changed[torch.randint(end, (), generator=generator)] ^= 1 << torch.randint(8, (), generator=generator).byte()
        changes.append(changed)

    def verdicts():
        found = []
        for changed in changes:
            try:
                elsa_kernels.check(changed)
                found.append(True)
            except (ValueError, IndexError):
                found.append(False)
        return found

    compiled = verdicts()
    monkeypatch.setattr(library, "compiled", lambda: None)
    assert compiled == verdicts()
    assert compiled[0] and not compiled[1] and 10 < sum(compiled) < 140


@pytest.mark.parametrize("cut", [0, 1, 127, 128, 200, -64, -1])
def test_cut_off_tensors_are_refused(cut):
    packed = pack(sparse_weight(37, 131, 0.2))
    for call in (elsa_kernels.check, elsa_kernels.describe, elsa_kernels.unpack):
        with pytest.raises(ValueError, match="corrupt|cut off"):  # noqa: RUF043
            call(packed[:cut].clone())


def test_every_field_of_the_header_is_looked_at():
    for layout in LAYOUTS if elsa_kernels.backend() != "torch" else [Layout.CSR]:
        packed = pack(sparse_weight(37, 131, 0.2), layout, values="int8")
        for field in range(16):
            for change in (1, 1 << 40, -1):
                changed = packed.clone()
                changed[:128].view(torch.int64)[field] += change
                if field == 7 and change == -1:
                    continue  # scales in bf16 instead of fp16: other numbers, nothing corrupt
                with pytest.raises(ValueError):
                    elsa_kernels.check(changed)


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory, can_build):
    """The library and a driver, built with sanitizers."""
    build = tmp_path_factory.mktemp("fuzzer")
    driver = Path(__file__).parent / "fuzzer.cpp"
    configure = ["cmake", "-S", SOURCES, "-B", build, f"-DELSA_KERNELS_FUZZER={driver}"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", build, "--parallel", "2"], check=True, capture_output=True)
    return build / "elsa_kernels_fuzzer"


@layouts
@pytest.mark.parametrize("values", VALUES)
def test_kernels_stay_inside_of_what_was_checked(values, layout, fuzzer, tmp_path):
    weight = sparse_weight(37, 131, 0.2, uneven=True)
    packed = pack(weight, layout, values=values)
    assert read_header(packed).layout == layout
    file = tmp_path / "packed"
    file.write_bytes(bytes(packed.tolist()))
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1"}
    run = subprocess.run([fuzzer, file, "600", "0"], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    refused, computed = map(int, re.findall(r"\d+", run.stdout))
    assert refused > 100 and computed > 20
