"""What can be known of the Triton kernels without a GPU: they compute under the interpreter, they compile, and the
host reads nothing of the device.
"""

import os
import subprocess
import sys
from pathlib import Path

import elsa_kernels
import pytest
import torch
from elsa_kernels import gpu_linear as module
from torch._subclasses.fake_tensor import FakeTensorMode

NO_TRITON = "needs triton, which a checkout without it can install: pip install triton"
TESTS = Path(__file__).parents[1]
INTERPRETED = ["kernels/test_triton_product.py", "sparse/test_on_gpu_products.py"]


@pytest.mark.parametrize("file", INTERPRETED)
def test_kernels_compute_under_the_interpreter(file):
    """In a process of its own: Triton asks for the interpreter when it is imported."""
    pytest.importorskip("triton", reason=NO_TRITON)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", TESTS / file],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


TARGETS = [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)]


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_product_compiles(target, tokens, tmp_path, monkeypatch):
    compiled = compile_kernel("linear_kernel", target, tmp_path, monkeypatch, x="*bf16", y="*bf16", TOKENS=tokens)
    if target[0] == "cuda":
        # Two loads of each of three loops: 16 bytes of values a lane.
        assert "ld.global.v4.b32" in compiled.asm["ptx"] and ".local" not in compiled.asm["ptx"]
    if tokens == 1:
        # Slots stay in the lanes that loaded them: shared memory is for a number a row at most.
        assert compiled.metadata.shared <= 16


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_decompression_compiles(target, tmp_path, monkeypatch):
    compile_kernel("dense_kernel", target, tmp_path, monkeypatch, dense="*bf16")


def compile_kernel(name, target, cache, monkeypatch, **arguments):
    """Compiled as gpu_linear launches it, down to the machine code of a GPU that need not be there."""
    pytest.importorskip("triton", reason=NO_TRITON)
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    from elsa_kernels import triton_gaps

    kernel = getattr(triton_gaps, name)
    constants = {"ROWS": 4, "PAIRS": 64} | {key: value for key, value in arguments.items() if isinstance(value, int)}
    signature = {"words": "*i32"} | arguments | dict.fromkeys(constants, "constexpr")
    signature = {argument: signature.get(argument, "i32") for argument in kernel.arg_names}
    # Of allocations, and of sizes that are multiples of 16.
    divisible = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind != "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    return compile(source, target=GPUTarget(*target), options={"num_warps": 2})


@pytest.fixture
def launches(monkeypatch):
    """What would be launched, instead of kernels."""
    seen = []

    monkeypatch.setattr(module, "_launch", lambda name, arguments, rows, *_, **__: seen.append((name, rows)))
    return seen


@pytest.mark.parametrize("tokens", [0, 1, 3, 8, 9])
def test_nothing_of_the_device_is_read_on_the_host(launches, tokens):
    """Meta tensors have nothing to read, and say so."""
    packed = torch.empty(16000, dtype=torch.uint8, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        packed.sum().item()
    y = module.gpu_linear(torch.empty(2, tokens, 96, device="meta", dtype=torch.bfloat16), packed, 20)
    assert (y.shape, y.dtype, y.device.type) == ((2, tokens, 20), torch.bfloat16, "meta")
    kernel = "dense_kernel" if 2 * tokens > module.FEW_TOKENS else "linear_kernel"
    assert launches == ([(kernel, 20)] if tokens else [])


def test_operation_has_a_result_on_fake_cuda_tensors():
    with FakeTensorMode():
        x = torch.empty(2, 3, 96, device="cuda", dtype=torch.float16)
        y = torch.ops.elsa_kernels.linear(x, torch.empty(16000, dtype=torch.uint8, device="cuda"), 20)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 20), torch.float16, "cuda")


def test_missing_triton_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "elsa_kernels.triton_gaps", None)
    monkeypatch.delattr(elsa_kernels, "triton_gaps", raising=False)
    with pytest.raises(ImportError, match="pip install triton"):
        module.gpu_linear(torch.ones(1, 96), torch.zeros(1600, dtype=torch.uint8), 20)


def test_cuda_tensors_go_to_the_kernels():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("elsa_kernels::linear", "CUDA")


@pytest.mark.parametrize(
    ("x", "packed", "rows"),
    [
        (torch.ones(2, 96).double(), torch.zeros(1600, dtype=torch.uint8), 20),
        (torch.ones(2, 96, device="meta"), torch.zeros(1600, dtype=torch.uint8), 20),
        (torch.tensor(1.0), torch.zeros(1600, dtype=torch.uint8), 20),
        (torch.ones(2, 0), torch.zeros(1600, dtype=torch.uint8), 20),
        (torch.ones(2, 96), torch.zeros(1600, dtype=torch.int8), 20),
        (torch.ones(2, 96), torch.zeros(2, 1600, dtype=torch.uint8), 20),
        (torch.ones(2, 96), torch.zeros(1601, dtype=torch.uint8), 20),
        (torch.ones(2, 96), torch.zeros(1600, dtype=torch.uint8), 400),
        (torch.ones(2, 96), torch.zeros(1600, dtype=torch.uint8), 0),
    ],
)
def test_wrong_arguments_are_refused(launches, x, packed, rows):
    with pytest.raises(ValueError, match="packed"):
        module.gpu_linear(x, packed, rows)
    assert not launches
