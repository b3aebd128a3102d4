"""How fast a model is on this machine with its sparse weights compressed in memory, beside the same model dense.

Both are in memory at once and are measured in turns, so that whatever else the machine does meanwhile falls on both.
Only the model's forward pass is timed: what ``generate`` does around it is the same for either.
"""

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from elsa_sparse.checkpoint import CONFIG_FILE, read_json
from elsa_sparse.compression_rule import kernels
from elsa_sparse.opening import is_sparse
from elsa_sparse.sparse_linear import SparseLinear
from elsa_sparse.transformers_loading import load_sparse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Comparison", "Speed", "compare_speed", "weight_bytes"]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens a second of one kind of work, dense and compressed: the median of the rounds.

    :param what: ``decode`` or ``prefill``
    :param batch: sequences at a time
    :param slowest: of compressed over dense, in a round
    :param fastest: of compressed over dense, in a round
    """

    what: str
    batch: int
    dense: float
    compressed: float
    slowest: float
    fastest: float

    @property
    def ratio(self) -> float:
        """How many times faster the compressed model is."""
        return self.compressed / self.dense


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was measured, and on what.

    :param backend: of ``elsa_kernels``: the instructions that it uses here
    :param layers: linear layers, and how many of them are compressed
    :param dense_bytes: of all parameters and buffers of the dense model
    :param compressed_bytes: of those of the compressed one
    :param logit_difference: the largest, of a prompt's tokens and of the first that are decoded
    :param logit_range: the largest magnitude of a logit of the dense model there
    """

    backend: str
    threads: int
    dtype: str
    prompt: int
    tokens: int
    rounds: int
    layers: tuple[int, int]
    dense_bytes: int
    compressed_bytes: int
    logit_difference: float
    logit_range: float
    speeds: tuple[Speed, ...]


def compare_speed(
    directory: Path,
    *,
    batches: Sequence[int] = (1, 4, 16),
    prompt: int = 128,
    tokens: int = 16,
    rounds: int = 5,
    threads: int | None = None,
    int8_head: bool = False,
    progress: bool = True,
) -> Comparison:
    """Load a checkpoint twice, dense and compressed, and measure both in turns.

    :param directory: a sparse checkpoint, or a dense one of a pruned model
    :param batches: numbers of sequences that are decoded at a time
    :param prompt: tokens that each sequence starts with, which are the prefill of one sequence, too
    :param tokens: decoded in a round, of each sequence
    :param rounds: times that everything is measured; medians are reported
    :param threads: of torch; None for as many as it takes by itself
    :param int8_head: of the compressed model, see :func:`~elsa_sparse.transformers_loading.load_sparse`
    :raises ImportError: if elsa-kernels is not installed
    :raises ValueError: if a number is less than 1, or sequences would be longer than the model takes
    """
    for name, value in (("prompt", prompt), ("tokens", tokens), ("rounds", rounds), ("threads", threads or 1)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it has to be at least 1")
    if not batches or min(batches) < 1:
        raise ValueError(f"batches are {[*batches]}; they have to be at least one, and each at least 1")
    backend = kernels().backend()
    with _threads(threads) as used, torch.inference_mode():
        models = [_load(directory, compressed=compressed, int8_head=int8_head) for compressed in (False, True)]
        dense, compressed = models
        _check_length(dense, prompt + (rounds + 1) * tokens)
        ids = _prompts(dense, max(batches), prompt)
        difference, largest = _logits_differ(dense, compressed, ids[:1])
        speeds = _measure(models, ids, batches, tokens, rounds, progress)
        linear = [type(module) for module in compressed.modules() if isinstance(module, (nn.Linear, SparseLinear))]
        return Comparison(
            backend=backend,
            threads=used,
            dtype=str(dense.dtype).removeprefix("torch."),
            prompt=prompt,
            tokens=tokens,
            rounds=rounds,
            layers=(sum(type(m) is nn.Linear for m in dense.modules()), linear.count(SparseLinear)),
            dense_bytes=weight_bytes(dense),
            compressed_bytes=weight_bytes(compressed),
            logit_difference=difference,
            logit_range=largest,
            speeds=speeds,
        )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, those that are one tensor counted once."""
    storages = (tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers()))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _load(directory: Path, *, compressed: bool, int8_head: bool) -> "PreTrainedModel":
    if is_sparse(read_json(directory / CONFIG_FILE)):
        return load_sparse(directory, compressed=compressed, int8_head=compressed and int8_head)
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = {}
    if compressed:
        from elsa_sparse.transformers_quantizer import ElsaSparseConfig

        settings["quantization_config"] = ElsaSparseConfig(int8_head=int8_head)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, **settings)
    return model


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(min(count, os.cpu_count() or count))
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _check_length(model: "PreTrainedModel", length: int) -> None:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and length > most:
        raise ValueError(
            f"sequences would grow to {length} tokens, the prompt and those of all rounds; this model takes {most}"
        )


def _prompts(model: "PreTrainedModel", batch: int, length: int) -> torch.Tensor:
    """(batch, length) ids, drawn at random: no time depends on them."""
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


def _logits_differ(dense: Any, compressed: Any, ids: torch.Tensor) -> tuple[float, float]:
    """The largest difference of a logit, and the largest logit, of a prompt and one more token."""
    found = []
    for model in (dense, compressed):
        output = model(ids)
        step = model(ids[:, :1], past_key_values=output.past_key_values)
        found.append(torch.cat([output.logits, step.logits], 1).float())
    return float((found[0] - found[1]).abs().max()), float(found[0].abs().max())


def _measure(
    models: Sequence[Any], ids: torch.Tensor, batches: Sequence[int], tokens: int, rounds: int, progress: bool
) -> tuple[Speed, ...]:
    """Rounds of every kind of work, each model's turn after the other's."""
    decoders = {batch: [_Decoder(model, ids[:batch]) for model in models] for batch in batches}
    jobs = [("prefill", 1), *(("decode", batch) for batch in batches)]
    seconds: dict[tuple[str, int], list[list[float]]] = {job: [] for job in jobs}
    with tqdm(total=len(seconds) * (rounds + 1), desc="bench", disable=not progress) as bar:
        for turn in range(rounds + 1):
            for what, batch in seconds:
                if what == "prefill":
                    times = [_prefill(model, ids[:1]) for model in models]
                else:
                    times = [decoder.seconds(tokens) for decoder in decoders[batch]]
                # The first turn is for caches and the allocator, and not counted.
                if turn:
                    seconds[what, batch].append(times)
                bar.update()
    speeds = []
    for what, batch in seconds:
        done = ids.shape[1] if what == "prefill" else batch * tokens
        dense, compressed = ([times[i] for times in seconds[what, batch]] for i in (0, 1))
        ratios = [d / c for d, c in zip(dense, compressed, strict=True)]
        speeds.append(
            Speed(
                what=what,
                batch=batch,
                dense=done / statistics.median(dense),
                compressed=done / statistics.median(compressed),
                slowest=min(ratios),
                fastest=max(ratios),
            )
        )
    return tuple(speeds)


def _prefill(model: Any, ids: torch.Tensor) -> float:
    """Seconds for a prompt, up to the logits of what follows it."""
    start = time.perf_counter()
    model(ids, logits_to_keep=1)
    return time.perf_counter() - start


class _Decoder:
    """Sequences that grow, by so many tokens whenever it is asked for."""

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        self._model = model
        self._output = model(ids, logits_to_keep=1)

    def seconds(self, tokens: int) -> float:
        """Time for so many tokens of each sequence, one after the other."""
        start = time.perf_counter()
        for _ in range(tokens):
            token = self._output.logits[:, -1:].argmax(-1)
            self._output = self._model(token, past_key_values=self._output.past_key_values)
        return time.perf_counter() - start
