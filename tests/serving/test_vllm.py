"""A real vLLM server loads sparse directories of a real pruned model. Run by ``make serve-test``."""

import re
import shutil
import subprocess

import pytest
from llmcompressor import oneshot
from transformers import AutoTokenizer

from benchmarks.assets import evaluation_sequences, model_directory, training_texts
from benchmarks.vllm_server import PYTHON, serve
from elsa_modifier import ELSAModifier, save_sparse
from elsa_sparse import unpack

pytestmark = pytest.mark.serving

TOKENS = 1000


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """SmolLM2-135M pruned to 80% for a minute and written sparse by ``oneshot``; the same dense, and as bitmasks."""
    root = tmp_path_factory.mktemp("serving")
    oneshot(
        model=str(model_directory()),
        dataset=training_texts(),
        recipe=[ELSAModifier(sparsity=0.8, steps=16, batch_size=2, sequence_length=256, checkpoint="coded")],
        output_dir=str(root / "coded"),
    )
    unpack(root / "coded", root / "dense", progress=False)
    save_sparse(root / "dense", root / "bitmask", encoding="bitmask", progress=False)
    return root


def ask(server, checkpoints):
    """Log-probabilities of a held-out prompt's tokens, and a completion."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoints / "dense")
    prompt = evaluation_sequences(tokenizer, sequences=2, length=512)["C4"].reshape(-1)[: TOKENS + 1].tolist()
    scored = server.post("/v1/completions", prompt=prompt, max_tokens=1, temperature=0, prompt_logprobs=0)
    logprobs = [
        position[str(token)]["logprob"]
        for token, position in zip(prompt[1:], scored["choices"][0]["prompt_logprobs"][1:], strict=True)
    ]
    answer = server.post(
        "/v1/completions", prompt="The city lies on the river and", max_tokens=16, temperature=0, seed=0
    )
    return logprobs, answer["choices"][0]["text"], answer["usage"]


def test_served_as_the_dense_model_is(checkpoints, tmp_path):
    with serve(checkpoints / "dense", tmp_path / "dense.log") as server:
        dense = ask(server, checkpoints)
        assert "Rebuilding sparse tensors" not in server.log
    # The format recognised by itself; and named.
    with serve(checkpoints / "coded", tmp_path / "coded.log") as server:
        coded = ask(server, checkpoints)
        assert "Rebuilding sparse tensors: 100%" in server.log
        assert "already registered" not in server.log
    with serve(checkpoints / "bitmask", tmp_path / "bitmask.log", "--load-format", "elsa-sparse") as server:
        bitmask = ask(server, checkpoints)
        assert "Rebuilding sparse tensors: 100%" in server.log

    logprobs, text, usage = dense
    assert len(logprobs) == TOKENS and len(set(logprobs)) > TOKENS // 2
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
