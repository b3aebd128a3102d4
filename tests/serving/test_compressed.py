"""vLLM keeps pruned weights compressed in memory, in real servers and in engines alone. Run by ``make serve-test``."""

import re
import shutil
import subprocess

import pytest
import torch

from benchmarks.random_llama import random_llama
from benchmarks.vllm_server import PYTHON, serve
from elsa_modifier import save_sparse
from tests.serving.asking import ask, distance, logprobs_of, prompt_of
from tests.serving.engines import answers

pytestmark = pytest.mark.serving

COMPRESSED = re.compile(r"(\d+) of (\d+) linear layers compressed in memory, ([\d,.]+) MB -> ([\d,.]+) MB")
# Of the spread of log-probabilities. Another order of sums in bf16 is a hundredth; a wrong weight or row is a half.
CLOSE = 0.03
HAS_AVX512 = torch.cpu._is_avx512_supported()
needs_kernels = pytest.mark.skipif(
    not list(PYTHON.parents[1].glob("lib/*/site-packages/elsa_kernels/libelsa_kernels.so")),
    reason="elsa-kernels was installed without a C++ compiler: weights are served dense",
)


@needs_kernels
def test_a_pruned_model_answers_as_dense(checkpoints, dense_answer, tmp_path):
    with serve(checkpoints / "coded", tmp_path / "compressed.log") as server:
        compressed = ask(server, prompt_of(checkpoints / "dense"))
        [(layers, of, before, after)] = COMPRESSED.findall(server.log)
    assert (layers, of, before) == ("120", "120", "212.3")
    # Without AVX-512 a kept weight takes four bytes.
    assert float(after) < 212.3 / (5.5 if HAS_AVX512 else 4.9)
    assert distance(compressed[0], dense_answer[0]) < CLOSE
    assert compressed[1] == dense_answer[1] and compressed[1].strip()


@needs_kernels
def test_tensor_parallel_ranks(small, small_prompt, small_answers, tmp_path):
    # On a machine with one NUMA node vLLM wants to be told which core is whose.
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with serve(
        small / "sparse", tmp_path / "server.log", "--tensor-parallel-size", "2", environment=environment
    ) as server:
        logprobs = logprobs_of(server, small_prompt)
        found = COMPRESSED.findall(server.log)
    assert [layers[:2] for layers in found] == [("7", "8")] * 2
    assert distance(logprobs, small_answers["dense"].logprobs) < CLOSE


@needs_kernels
def test_fused_layers_and_rounding_while_loading(small_answers):
    assert not COMPRESSED.search(small_answers["dense"].log) and not COMPRESSED.search(small_answers[False].log)
    assert distance(small_answers[False].logprobs, small_answers["dense"].logprobs) == 0
    after = {}
    for values, limit in ((True, CLOSE), ("int8", 2 * CLOSE), ("int4", 0.4)):
        assert distance(small_answers[values].logprobs, small_answers["dense"].logprobs) < limit
        # The layer with hardly a zero stays dense.
        [(layers, of, _, size)] = COMPRESSED.findall(small_answers[values].log)
        assert (layers, of) == ("7", "8")
        after[values] = float(size)
    assert after["int4"] < after["int8"] < after[True]


@needs_kernels
def test_compiled_and_compiled_again_for_another_setting(small, small_prompt, small_answers, tmp_path):
    """Compiled graphs are kept on disk, and hold sizes of packed weights and which layers have them."""
    environment = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    settings = {True: (7, CLOSE), "int8": (7, 2 * CLOSE), False: (0, CLOSE)}
    asked = [(small / "sparse", {"compressed": values}) for values in settings]
    found = answers(asked, small_prompt, tmp_path, environment=environment, enforce_eager=False)
    for answer, (layers, limit) in zip(found, settings.values(), strict=True):
        assert distance(answer.logprobs, small_answers["dense"].logprobs) < limit
        compressed = COMPRESSED.search(answer.log)
        assert (int(compressed[1]) if compressed else 0) == layers and "saved AOT compiled function" in answer.log
    # This vLLM fails to load what it kept, and compiles again; one that does not must find none of another setting.
    assert len(list((tmp_path / "cache").glob("torch_compile_cache/torch_aot_compile/*"))) == 3


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_stay_integers(bits, small_answers):
    answer = small_answers[f"w{bits}a16/sparse"]
    [(layers, of, before, after)] = COMPRESSED.findall(answer.log)
    # vLLM computes with 4 bits itself, and gets the layer with hardly a zero back; with 8 bits it does not.
    assert (layers, of) == ("7" if bits == 4 and HAS_AVX512 else "8", "8")
    # A layer with hardly a zero takes more than 4 bits a weight, and that may be all that the others save.
    assert float(after) < float(before) or (bits == 4 and not HAS_AVX512 and after == before)
    assert distance(answer.logprobs, small_answers[f"w{bits}a16/dense"].logprobs) < CLOSE


@needs_kernels
def test_without_avx512(small, small_prompt, small_answers, tmp_path):
    """vLLM has no kernel for 4 bits then, and every layer of such a checkpoint is ours."""
    asked = [(small / "sparse", {}), (small / "w4a16/sparse", {})]
    sparse, quantized = answers(asked, small_prompt, tmp_path, taken_for="avx2")
    assert [COMPRESSED.search(answer.log)[1] for answer in (sparse, quantized)] == ["7", "8"]
    assert distance(sparse.logprobs, small_answers["dense"].logprobs) < CLOSE
    assert distance(quantized.logprobs, small_answers["w4a16/dense"].logprobs) < CLOSE


@pytest.mark.parametrize("tokens", [13, 40])
def test_on_a_gpu(tokens, small, small_prompt, tmp_path):
    """Triton's interpreter runs the kernels: of few tokens, and of many."""
    asked = [(small / "sparse", {"compressed": "gpu"}), (small / "sparse", {})]
    compressed, dense = answers(asked, small_prompt[:tokens], tmp_path, taken_for="gpu")
    assert distance(compressed.logprobs, dense.logprobs) < CLOSE
    [(layers, of, before, after)] = COMPRESSED.findall(compressed.log)
    assert (layers, of) == ("7", "8") and float(after) < float(before) / 3
    # Nobody has run these kernels on a GPU, so they have to be asked for.
    assert not COMPRESSED.search(dense.log)
    [line] = [line for line in dense.log.splitlines() if "Serving the sparse checkpoint" in line]
    assert "INFO" in line and """--model-loader-extra-config '{"compressed": "gpu"}'""" in line


@pytest.mark.skipif(not HAS_AVX512, reason="vLLM's own kernel for 4 bits needs AVX-512 on a CPU")
def test_integers_are_left_to_vllm_on_a_gpu(small, small_prompt, tmp_path):
    [quantized] = answers([(small / "w4a16/sparse", {"compressed": "gpu"})], small_prompt, tmp_path, taken_for="gpu")
    assert not COMPRESSED.search(quantized.log)


@needs_kernels
def test_memory_while_loading(tmp_path):
    """Dense weights exist one layer at a time: the server never takes as much as all of them alone would."""
    layers = 28
    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": layers, "num_attention_heads": 16}
    dense = random_llama(tmp_path / "dense", 0.95, vocabulary=2048, **shape)
    save_sparse(dense, tmp_path / "sparse", encoding="bitmask", progress=False)
    shutil.rmtree(dense)
    with serve(tmp_path / "sparse", tmp_path / "server.log") as server:
        assert server.resident("VmHWM") < 2 * layers * (4 * 2048**2 + 3 * 2048 * 5632)


def test_without_kernels_it_is_dense_and_says_what_to_install(small, small_prompt, tmp_path):
    shadow = tmp_path / "elsa_kernels"
    shadow.mkdir()
    (shadow / "__init__.py").write_text("def backend():\n    return 'torch'\n")
    asked = [(small / "sparse", loader) for loader in ({"compressed": False}, {})]
    dense, answer = answers(asked, small_prompt, tmp_path, environment={"PYTHONPATH": str(tmp_path)})
    assert answer.logprobs == dense.logprobs and "Serving the sparse checkpoint" not in dense.log
    [line] = [line for line in answer.log.splitlines() if "Serving the sparse checkpoint" in line]
    assert "WARNING" in line and "pip install --no-deps --force-reinstall elsa-kernels" in line


def run(script):
    """The last line that a script prints in the server's environment."""
    run = subprocess.run([str(PYTHON), "-c", script], capture_output=True, text=True, cwd="/")
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1]


def test_another_vllm_serves_dense():
    script = (
        "import vllm; vllm.__version__ = '0.33.1'; import elsa_sparse.vllm_loader as l; l.register(); "
        "from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS as m; "
        "from elsa_sparse.vllm_compressed import dense_reason; print(dense_reason(None, True)[1], 'elsa-sparse' in m)"
    )
    assert run(script) == "this is vLLM 0.33.1; compressed serving has been tried with 0.32.x False"


def test_a_switch_that_is_neither_is_refused():
    script = (
        "from elsa_sparse.vllm_loader import SparseModelLoader as L; from vllm.config.load import LoadConfig\n"
        "try: L(LoadConfig(model_loader_extra_config={'compressed': 'no'}))\n"
        "except ValueError as error: print(error)"
    )
    assert run(script).startswith("--model-loader-extra-config: compressed is 'no'; allowed are true")
