"""The products in AMX's tiles on a processor that has AVX-512 and no AMX: its tiles are emulated."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import elsa_kernels
import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "kernels"


def test_tiles_agree_with_the_twin(tmp_path, can_build):
    if elsa_kernels.backend() != "avx512":
        pytest.skip(f"the backend is {elsa_kernels.backend()}: either AMX itself is tested, or there is no AVX-512")
    package = tmp_path / "elsa_kernels"
    shutil.copytree(Path(elsa_kernels.__file__).parent, package)
    flags = f"-include {HERE / 'emulated_amx.h'} -DELSA_EMULATED_AMX"
    configure = ["cmake", "-S", SOURCES, "-B", tmp_path / "build", f"-DCMAKE_CXX_FLAGS={flags}"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", tmp_path / "build"], check=True, capture_output=True)
    shutil.copy(tmp_path / "build" / "libelsa_kernels.so", package)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    program = "import elsa_kernels; print(elsa_kernels.backend())"
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "avx512+amx"
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", HERE / "test_linear.py", "-k", "amx"]
    run = subprocess.run(tests, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout + run.stderr
