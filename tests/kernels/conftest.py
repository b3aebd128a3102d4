"""Each test that asks for ``isa`` runs with every instruction set that this machine has, and without the library."""

import os
import shutil

import elsa_kernels
import pytest
import torch
from elsa_kernels import library

ISAS = {"torch": "torch", "portable": "portable", "avx2": "avx2", "avx512": "avx512", "amx": "avx512+amx"}


@pytest.fixture(autouse=True)
def one_thread():
    """Small products wait longer for a second thread than they take, on a busy machine most of all."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def can_build():
    """Skips the test where the library cannot be built."""
    compilers = "c++", "g++", "clang++"
    if not shutil.which("cmake") or not (os.environ.get("CXX") or any(map(shutil.which, compilers))):
        pytest.skip("there is no cmake or no C++ compiler")


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """The instruction set, in force until the test's end."""
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, request.param)
    library.compiled.cache_clear()
    found = elsa_kernels.backend()
    if found != ISAS[request.param]:
        pytest.skip(f"this machine or build has {found}")
    yield request.param
    monkeypatch.undo()
    library.compiled.cache_clear()
    library.compiled()
