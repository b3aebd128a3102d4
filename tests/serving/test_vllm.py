"""A real vLLM server loads sparse directories of a real pruned model. Run by ``make serve-test``."""

import re
import shutil
import subprocess

import pytest

from benchmarks.vllm_server import PYTHON, serve
from tests.serving.asking import DENSE, TOKENS, ask, prompt_of

pytestmark = pytest.mark.serving


def test_served_as_the_dense_model_is(checkpoints, dense_answer, tmp_path):
    prompt = prompt_of(checkpoints / "dense")
    # The format recognised by itself; and named.
    with serve(checkpoints / "coded", tmp_path / "coded.log", *DENSE) as server:
        coded = ask(server, prompt)
        assert "Rebuilding sparse tensors: 100%" in server.log
        assert "already registered" not in server.log and "compressed in memory" not in server.log
    with serve(checkpoints / "bitmask", tmp_path / "bitmask.log", *DENSE, "--load-format", "elsa-sparse") as server:
        bitmask = ask(server, prompt)
        assert "Rebuilding sparse tensors: 100%" in server.log

    logprobs, text, usage = dense_answer
    assert len(logprobs) == TOKENS + 16 and len(set(logprobs)) > TOKENS // 2
    assert coded[0] == logprobs and bitmask[0] == logprobs
    assert coded[1] == bitmask[1] == text and text.strip()
    assert coded[2]["completion_tokens"] == usage["completion_tokens"] == 16


def test_damage_is_an_error_in_words(checkpoints, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoints / "coded", damaged)
    [file] = damaged.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(RuntimeError, match="did not come up") as error, serve(damaged, tmp_path / "damaged.log"):
        pass
    log = (tmp_path / "damaged.log").read_text()
    assert re.search(r"sparse-model-\S+\.safetensors: tensor model\.\S+: checksum does not match", log), error.value


def test_the_server_s_environment_has_nothing_that_prunes():
    script = (
        "import importlib.util as u, elsa_sparse.vllm_loader; "
        "print([m for m in ('llmcompressor', 'accelerate', 'datasets') if u.find_spec(m)])"
    )
    run = subprocess.run([str(PYTHON), "-c", script], capture_output=True, text=True, cwd="/")
    assert run.stdout.splitlines()[-1:] == ["[]"], run.stderr
