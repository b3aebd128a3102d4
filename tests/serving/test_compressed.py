"""A real vLLM server keeps pruned weights compressed in memory. Run by ``make serve-test``."""

import json
import re
import shutil
import subprocess

import pytest

from benchmarks.random_llama import random_llama
from benchmarks.vllm_server import PYTHON, serve
from elsa_modifier import save_sparse
from tests.serving.asking import DENSE, ask, distance, logprobs_of, prompt_of

pytestmark = pytest.mark.serving

COMPRESSED = re.compile(r"(\d+) of (\d+) linear layers compressed in memory, ([\d,.]+) MB -> ([\d,.]+) MB")
# Of the spread of log-probabilities. Another order of sums in bf16 is a hundredth; a wrong weight or row is a half.
CLOSE = 0.03


def test_a_pruned_model_answers_as_dense(checkpoints, tmp_path):
    prompt = prompt_of(checkpoints / "dense")
    with serve(checkpoints / "coded", tmp_path / "compressed.log") as server:
        compressed = ask(server, prompt)
        [(layers, of, before, after)] = COMPRESSED.findall(server.log)
    with serve(checkpoints / "coded", tmp_path / "dense.log", *DENSE) as server:
        dense = ask(server, prompt)
        assert not COMPRESSED.search(server.log)
    assert (layers, of, before) == ("120", "120", "212.3")
    assert float(after) < 212.3 / 5.5
    assert distance(compressed[0], dense[0]) < CLOSE
    assert compressed[1] == dense[1] and compressed[1].strip()


@pytest.mark.parametrize("ranks", [1, 2])
def test_fused_layers_and_tensor_parallel_ranks(small, tmp_path, ranks):
    prompt = prompt_of(small / "dense", 300)
    arguments = ("--tensor-parallel-size", str(ranks))
    # On a machine with one NUMA node vLLM wants to be told which core is whose.
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if ranks == 2 else {}
    with serve(small / "dense", tmp_path / "dense.log") as server:
        dense = logprobs_of(server, prompt)
    with serve(small / "sparse", tmp_path / "compressed.log", *arguments, environment=binding) as server:
        compressed = logprobs_of(server, prompt)
        found = COMPRESSED.findall(server.log)
    # The layer with hardly a zero stays dense, on every rank.
    assert [layers[:2] for layers in found] == [("7", "8")] * ranks
    assert distance(compressed, dense) < CLOSE


def test_compiled_and_compiled_again_for_another_setting(small, tmp_path):
    """Compiled graphs are kept on disk, and hold sizes of packed weights and which layers have them."""
    prompt = prompt_of(small / "dense", 300)
    environment = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    with serve(small / "dense", tmp_path / "eager.log") as server:
        expected = logprobs_of(server, prompt)
    for values, compressed, limit in ((True, 7, CLOSE), ("int8", 7, 2 * CLOSE), (False, 0, CLOSE)):
        arguments = ("--no-enforce-eager", "--model-loader-extra-config", json.dumps({"compressed": values}))
        with serve(small / "sparse", tmp_path / "compiled.log", *arguments, environment=environment) as server:
            assert distance(logprobs_of(server, prompt), expected) < limit
            found = COMPRESSED.search(server.log)
            assert (int(found[1]) if found else 0) == compressed and "saved AOT compiled function" in server.log
    # This vLLM fails to load what it kept, and compiles again; one that does not must find none of another setting.
    assert len(list((tmp_path / "cache").glob("torch_compile_cache/torch_aot_compile/*"))) == 3


def test_quantized_weights_stay_integers(quantized, tmp_path):
    root, bits = quantized
    prompt = prompt_of(root / "dense", 300)
    with serve(root / "dense", tmp_path / "dense.log") as server:
        dense = logprobs_of(server, prompt)
    with serve(root / "sparse", tmp_path / "compressed.log") as server:
        compressed = logprobs_of(server, prompt)
        [(layers, of, before, after)] = COMPRESSED.findall(server.log)
    # vLLM computes with 4 bits itself, and gets the layer with hardly a zero back; with 8 bits it does not.
    assert (layers, of) == ({4: "7", 8: "8"}[bits], "8")
    assert float(after) < float(before)
    assert distance(compressed, dense) < CLOSE


def test_rounded_while_loading(small, tmp_path):
    prompt = prompt_of(small / "dense", 300)
    with serve(small / "dense", tmp_path / "dense.log") as server:
        dense = logprobs_of(server, prompt)
    after = {}
    for values, limit in ((True, CLOSE), ("int8", 2 * CLOSE), ("int4", 0.4)):
        switch = ("--model-loader-extra-config", json.dumps({"compressed": values}))
        with serve(small / "sparse", tmp_path / "rounded.log", *switch) as server:
            assert distance(logprobs_of(server, prompt), dense) < limit
            [(*_, size)] = COMPRESSED.findall(server.log)
            after[values] = float(size)
    assert after["int4"] < after["int8"] < after[True]


def test_memory_while_loading(tmp_path):
    """Dense weights exist one layer at a time: the server never takes as much as all of them alone would."""
    layers = 28
    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": layers, "num_attention_heads": 16}
    dense = random_llama(tmp_path / "dense", 0.95, vocabulary=2048, **shape)
    save_sparse(dense, tmp_path / "sparse", encoding="bitmask", progress=False)
    shutil.rmtree(dense)
    with serve(tmp_path / "sparse", tmp_path / "server.log") as server:
        assert server.resident("VmHWM") < 2 * layers * (4 * 2048**2 + 3 * 2048 * 5632)


def test_without_kernels_it_is_dense_and_says_what_to_install(small, tmp_path):
    shadow = tmp_path / "elsa_kernels"
    shadow.mkdir()
    (shadow / "__init__.py").write_text("def backend():\n    return 'torch'\n")
    prompt = prompt_of(small / "dense", 300)
    with serve(small / "sparse", tmp_path / "dense.log", *DENSE) as server:
        dense = logprobs_of(server, prompt)
    with serve(small / "sparse", tmp_path / "shadow.log", environment={"PYTHONPATH": str(tmp_path)}) as server:
        assert logprobs_of(server, prompt) == dense
        [line] = [line for line in server.log.splitlines() if "Serving the sparse checkpoint" in line]
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
        "from elsa_sparse.vllm_compressed import dense_reason; print(dense_reason(None)[1], 'elsa-sparse' in m)"
    )
    assert run(script) == "this is vLLM 0.33.1; compressed serving has been tried with 0.32.x False"


def test_a_switch_that_is_neither_is_refused():
    script = (
        "from elsa_sparse.vllm_loader import SparseModelLoader as L; from vllm.config.load import LoadConfig\n"
        "try: L(LoadConfig(model_loader_extra_config={'compressed': 'no'}))\n"
        "except ValueError as error: print(error)"
    )
    assert run(script).startswith("--model-loader-extra-config: compressed is 'no'; allowed are true")
