"""Tiny random models and a tokenizer, made here: mechanics only. Real models are for the demo and the benchmarks."""

import copy
import os
import subprocess

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# No test leaves tokens in the user's cache, or finds some there.
os.environ["ELSA_CACHE"] = ""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3MoeConfig,
)

from elsa_modifier.training import run

WORDS = ["<eos>", "<unk>"] + [f"w{i}" for i in range(94)]
_COMMON = dict(vocab_size=96, bos_token_id=0, eos_token_id=0, pad_token_id=0, max_position_embeddings=64)
_LLAMA = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **_COMMON
)

CONFIGS = {
    "llama": LlamaConfig(**_LLAMA, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "llama-biased": LlamaConfig(**_LLAMA, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**_LLAMA),
    "opt": OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        dropout=0.1,
        **_COMMON,
    ),
    "gpt-neox": GPTNeoXConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **_COMMON
    ),
    "mixtral": MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": Qwen3MoeConfig(
        **_LLAMA, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1
    ),
}


def make_tokenizer():
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>", model_max_length=64
    )


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer):
    """Function from the name of a configuration, and a dtype, to a saved random model of it."""
    made = {}

    def make(name="llama", dtype=torch.float32):
        if (name, dtype) not in made:
            torch.manual_seed(0)
            directory = tmp_path_factory.mktemp(name)
            # A copy: saving writes the dtype into the configuration.
            AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).to(dtype).save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            made[name, dtype] = directory
        return made[name, dtype]

    return make


@pytest.fixture
def load(checkpoint):
    """The same, loaded."""

    def load(name="llama", dtype=torch.float32):
        return AutoModelForCausalLM.from_pretrained(checkpoint(name, dtype), dtype=dtype)

    return load


@pytest.fixture(scope="session")
def texts():
    """Documents of a language in which every word decides the next."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in torch.randint(5, 60, (64,), generator=generator).tolist():
        first = int(torch.randint(0, 94, (1,), generator=generator))
        rows.append(" ".join(f"w{(first + 7 * i) % 94}" for i in range(length)))
    return Dataset.from_dict({"text": rows})


@pytest.fixture
def before_first_step(monkeypatch):
    """Function that has another called in every run with what is trained, the targets and the optimizer."""

    def before_first_step(watch):
        inner = run.build_optimizer

        def build_optimizer(recipe, spread, targets):
            optimizer = inner(recipe, spread, targets)
            watch(spread, targets, optimizer)
            return optimizer

        monkeypatch.setattr(run, "build_optimizer", build_optimizer)

    return before_first_step


@pytest.fixture(autouse=True)
def fresh_session():
    """No modifier of one test is left in llm-compressor's global session for the next."""
    from llmcompressor.core import reset_session

    reset_session()
    yield
    reset_session()


@pytest.fixture
def mounted(tmp_path):
    """A file system of its own, of 8 MB."""
    place = tmp_path / "mounted"
    place.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"mounting is not permitted: {mount.stderr}")
    yield place
    subprocess.run(["umount", place], check=True)
