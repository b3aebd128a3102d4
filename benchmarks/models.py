"""The models that methods are compared on, each with text, a budget and what is never trained on."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.assets import (
    HELD_OUT_EVERY,
    evaluation_sequences,
    held_out_text,
    model_directory,
    text_file,
    training_texts,
)
from benchmarks.gemma import gemma_directory
from elsa_modifier.training.learning_rate import default_learning_rate

__all__ = ["GEMMA", "MODELS", "SMOLLM2", "STORIES", "BenchmarkModel"]


@dataclass(frozen=True)
class BenchmarkModel:
    """A model, and what every method gets to prune it: the same documents, and as many tokens of them.

    :param title: what pages call it
    :param text: what pages call its text
    :param directory: of the dense checkpoint, made on the first call
    :param training_texts: what ``oneshot`` takes: documents (``text``), or full windows (``input_ids``)
    :param held_out: by title, (sequences, length) token ids of documents that are not in the training text
    :param steps, batch_size, sequence_length: of methods that train. Those that calibrate get as many tokens, in
        ``calibration_samples`` windows of ``sequence_length``
    :param width: its hidden size
    :param lr_scale: the learning rates that are tried lie around so many times the default one
    """

    name: str
    title: str
    text: str
    directory: Callable[[], Path]
    training_texts: Callable[[], Dataset]
    held_out: Callable[[], dict[str, Tensor]]
    steps: int
    batch_size: int
    sequence_length: int
    width: int
    lr_scale: float = 1.0

    @property
    def budget(self) -> dict[str, Any]:
        """As fields of a modifier that trains."""
        return {"steps": self.steps, "batch_size": self.batch_size, "sequence_length": self.sequence_length}

    @property
    def calibration_samples(self) -> int:
        return self.steps * self.batch_size

    def learning_rates(self, sparsity: float) -> list[float]:
        """Those that are tried where a method has to be tuned: three, each twice the last."""
        centre = self.lr_scale * default_learning_rate(steps=self.steps, width=self.width, sparsity=sparsity)
        return [float(f"{factor * centre:.2g}") for factor in (0.5, 1.0, 2.0)]


def _windows(ids: list[int], length: int, *, first: int | None = None) -> Tensor:
    """A stream cut into (sequences, length), each of which begins with a token if one is given."""
    body = length if first is None else length - 1
    windows = torch.tensor(ids[: len(ids) // body * body]).view(-1, body)
    return windows if first is None else torch.nn.functional.pad(windows, (1, 0), value=first)


def _tokens(directory: Path, texts: list[str], *, begin: bool) -> list[int]:
    """One text after the other, each after the tokenizer's token for a beginning if asked for."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    start = [tokenizer.bos_token_id] if begin else []
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    return [token for ids in encoded for token in start + ids]


def _smollm2_held_out() -> dict[str, Tensor]:
    return evaluation_sequences(AutoTokenizer.from_pretrained(model_directory()), length=512)


def _stories_directory() -> Path:
    named = os.environ.get("ELSA_STORIES_DIRECTORY", "")
    if not (Path(named) / "config.json").is_file():
        raise FileNotFoundError(
            f"ELSA_STORIES_DIRECTORY is {named!r}; no package carries stories260K, so it has to name a directory with "
            "the model as transformers saves it, converted from karpathy/tinyllamas (stories260K and tok512)"
        )
    return Path(named)


def _stories(*, held_out: bool) -> list[str]:
    """TinyStories, with the typographer's quotes that this sample has in places, and the model's text had not."""
    plain = text_file("tiny").translate(str.maketrans("\u201c\u201d\u2018\u2019\u2013\u2014", "\"\"''--"))
    stories = [story.strip() for story in plain.split("<|endoftext|>") if story.strip()]
    return [story for i, story in enumerate(stories) if (i % HELD_OUT_EVERY == 0) == held_out]


def _stories_windows(*, held_out: bool) -> Tensor:
    """As the model was trained: stories in a row, each after ``<s>``, cut anywhere."""
    return _windows(_tokens(_stories_directory(), _stories(held_out=held_out), begin=True), STORIES.sequence_length)


def _gemma_windows(texts: list[str]) -> Tensor:
    """Every window after ``<bos>``: without it the model, dense or not, is some three times as perplexed."""
    tokenizer = AutoTokenizer.from_pretrained(gemma_directory())
    ids = _tokens(gemma_directory(), texts, begin=False)
    return _windows(ids, GEMMA.sequence_length, first=tokenizer.bos_token_id)


def _dataset(windows: Tensor) -> Dataset:
    return Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()})


SMOLLM2 = BenchmarkModel(
    name="smollm2",
    title="SmolLM2-135M-Instruct",
    text="C4 and Wikipedia",
    directory=model_directory,
    training_texts=training_texts,
    held_out=_smollm2_held_out,
    steps=64,
    batch_size=2,
    sequence_length=512,
    width=576,
)

STORIES = BenchmarkModel(
    name="stories260k",
    title="stories260K",
    text="a TinyStories sample of 110,336",
    directory=_stories_directory,
    training_texts=lambda: _dataset(_stories_windows(held_out=False)),
    held_out=lambda: {"TinyStories": _stories_windows(held_out=True)},
    steps=300,
    batch_size=4,
    sequence_length=256,
    width=64,
)

GEMMA = BenchmarkModel(
    name="gemma3",
    title="Gemma-3-270M",
    text="C4 and Wikipedia",
    directory=gemma_directory,
    training_texts=lambda: _dataset(_gemma_windows([f"{text}\n\n" for text in training_texts()["text"]])),
    held_out=lambda: {title: _gemma_windows([text])[:24] for title, text in held_out_text().items()},
    steps=64,
    batch_size=1,
    sequence_length=512,
    width=640,
)

MODELS = {model.name: model for model in (SMOLLM2, STORIES, GEMMA)}
