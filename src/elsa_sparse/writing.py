"""Packing a checkpoint into the sparse format, and unpacking it to plain safetensors: shard by shard, atomically."""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from elsa_sparse.atomic import replaced_directory
from elsa_sparse.checkpoint import (
    CONFIG_FILE,
    CONFIG_KEY,
    FORMAT_VERSION,
    INDEX_FILE,
    Shards,
    read_json,
    read_weight_map,
)
from elsa_sparse.companions import copy_companions
from elsa_sparse.entry import ENCODINGS, Encoding, TensorEntry, encode
from elsa_sparse.errors import SparseCheckpointError
from elsa_sparse.model_card import CARD_FILE, model_card
from elsa_sparse.opening import HINT, dense_config, is_sparse, open_checkpoint
from elsa_sparse.symbols import count_negative_zeros

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["DEFAULT_SHARD_SIZE", "Written", "dense_files", "save_sparse", "save_through", "unpack"]

DEFAULT_SHARD_SIZE = "1GB"

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_DENSE_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Written:
    """Sizes of a checkpoint that was written, without headers, in bytes.

    :param dense_bytes: of its tensors, dense
    :param stored_bytes: of its tensors, as they are stored now
    :param signs: zeros whose sign was not kept
    """

    dense_bytes: int
    stored_bytes: int
    signs: int = 0


class _ShardWriter:
    """Collects parts, and writes them to a file whenever there are enough of them."""

    def __init__(self, directory: Path, stem: str, shard_size: int) -> None:
        self._directory, self._stem, self._shard_size = directory, stem, shard_size
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._files: list[list[str]] = []
        self.total_size = 0

    def add(self, parts: dict[str, Tensor]) -> None:
        """Parts of one tensor; they stay together in a file."""
        size = sum(part.numel() * part.element_size() for part in parts.values())
        if self._pending and self._pending_bytes + size > self._shard_size:
            self._write()
        self._pending |= parts
        self._pending_bytes += size

    def _write(self) -> None:
        file = self._directory / self._numbered(len(self._files))
        try:
            save_file(self._pending, file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{file} cannot be written: {error}") from error
        self._files.append(list(self._pending))
        self.total_size += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> dict[str, str]:
        """Write what is left, give the files their final names, and return the name of every part's file."""
        if self._pending or not self._files:
            self._write()
        count = len(self._files)
        weight_map: dict[str, str] = {}
        for i, parts in enumerate(self._files):
            name = f"{self._stem}.safetensors" if count == 1 else f"{self._stem}-{i + 1:05}-of-{count:05}.safetensors"
            (self._directory / self._numbered(i)).rename(self._directory / name)
            weight_map |= dict.fromkeys(parts, name)
        return dict(sorted(weight_map.items()))

    def _numbered(self, i: int) -> str:
        return f"{self._stem}-{i + 1:05}.safetensors"


def save_sparse(
    model_or_dir: "PreTrainedModel | str | Path",
    out_dir: str | Path,
    *,
    encoding: Encoding = "coded",
    bit_equal: bool = False,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    progress: bool = True,
) -> Written:
    """Write a sparse checkpoint, equal to the dense one in every value; and say what it takes.

    ``out_dir`` appears at once and complete, or not at all; an older checkpoint there stays whole until then. A tensor
    that would not get smaller is stored dense. Tokenizer, generation config, recipe and model card of a directory
    travel along; a model card is written where there is none.

    :param model_or_dir: a transformers model, which is first saved as usual in a temporary directory beside
        ``out_dir``, or a directory with a checkpoint in safetensors: dense, quantized, or sparse itself
    :param out_dir: directory to write
    :param encoding: ``coded`` (smallest), or ``bitmask`` (the layout of compressed-tensors up to 0.14, faster to read)
    :param bit_equal: keep the sign of zeros too: a weight pruned by a product with its mask is -0.0 where it was
        negative, which then takes as much as a weight that is kept
    :param max_shard_size: of a file, in bytes or like ``"2GB"``; also the memory that packing needs beyond one tensor
    :param overwrite: allow that ``out_dir`` exists and is not empty
    :param progress: show a progress bar
    :raises SparseCheckpointError: if the source cannot be read, or holds what cannot be stored
    :raises FileExistsError: if ``out_dir`` may not be overwritten
    :raises ValueError: if ``encoding`` or ``max_shard_size`` is not what it may be
    """
    if isinstance(model_or_dir, (str, Path)):
        shard_size = _checked(encoding, max_shard_size)
        with replaced_directory(Path(out_dir), overwrite=overwrite) as partial:
            return _pack(Path(model_or_dir), partial, encoding, bit_equal, shard_size, progress)
    return save_through(
        model_or_dir.save_pretrained,
        out_dir,
        encoding=encoding,
        bit_equal=bit_equal,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        progress=progress,
    )


def save_through(
    save_dense: Callable[[Path], Any],
    out_dir: str | Path,
    *,
    encoding: Encoding = "coded",
    bit_equal: bool = False,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    progress: bool = True,
) -> Written:
    """As :func:`save_sparse`, of the checkpoint that ``save_dense`` writes to the directory it is given."""
    shard_size = _checked(encoding, max_shard_size)
    with replaced_directory(Path(out_dir), overwrite=overwrite) as partial:
        dense = partial / "dense"
        dense.mkdir()
        save_dense(dense)
        written = _pack(dense, partial, encoding, bit_equal, shard_size, progress)
        shutil.rmtree(dense)
    return written


def _checked(encoding: Encoding, max_shard_size: int | str) -> int:
    if encoding not in ENCODINGS or encoding == "dense":
        raise ValueError(f"encoding is {encoding!r}; allowed are 'coded' and 'bitmask'")
    return _parse_size(max_shard_size)


def _pack(source: Path, target: Path, encoding: Encoding, bit_equal: bool, shard_size: int, progress: bool) -> Written:
    """Write a directory's checkpoint to another, existing one, ``config.json`` last."""
    config = dense_config(read_json(source / CONFIG_FILE))
    writer = _ShardWriter(target, "sparse-model", shard_size)
    entries: list[TensorEntry] = []
    signs = 0
    with _opened(source) as (count, tensors):
        for name, tensor in _with_progress(tensors, count, "pack", progress):
            # Where the configuration ties embeddings, a head in the checkpoint tells vLLM that they are not tied; it
            # looks for it by its name.
            untied = name.endswith("lm_head.weight") and config.get("tie_word_embeddings", False)
            entry, parts = encode(name, tensor, "dense" if untied else encoding, bit_equal=bit_equal)
            if entry.encoding != "dense" and not bit_equal:
                signs += count_negative_zeros(tensor)
            entries.append(entry)
            writer.add({entry.parts[part]: stored for part, stored in parts.items()})
    weight_map = writer.finish()
    if len(weight_map) != sum(len(entry.parts) for entry in entries):
        raise SparseCheckpointError("two of its tensors would be stored under the same name", file=source)
    _write_json(target / INDEX_FILE, {"metadata": {"total_size": writer.total_size}, "weight_map": weight_map})
    copy_companions(source, target, leave=frozenset((CONFIG_FILE,)))
    if not (target / CARD_FILE).exists():
        (target / CARD_FILE).write_text(model_card(config, entries, writer.total_size), encoding="utf-8")
    _write_sparse_config(target / CONFIG_FILE, config, entries)
    dense_bytes = sum(entry.dense_bytes for entry in entries)
    return Written(dense_bytes=dense_bytes, stored_bytes=writer.total_size, signs=signs)


def unpack(
    directory: str | Path,
    out_dir: str | Path,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    progress: bool = True,
) -> Written:
    """Write a sparse checkpoint as plain dense safetensors, which every engine reads. Atomic, as :func:`save_sparse`.

    :raises SparseCheckpointError: if the checkpoint is not sparse, or not what it should be
    :raises FileExistsError: if ``out_dir`` may not be overwritten
    """
    source, shard_size = Path(directory), _parse_size(max_shard_size)
    checkpoint = open_checkpoint(source)
    with checkpoint, replaced_directory(Path(out_dir), overwrite=overwrite) as target:
        writer = _ShardWriter(target, "model", shard_size)
        for name, tensor in _with_progress(checkpoint, len(checkpoint.entries), "unpack", progress):
            writer.add({name: tensor})
        weight_map = writer.finish()
        if len(set(weight_map.values())) > 1:
            _write_json(
                target / _DENSE_INDEX, {"metadata": {"total_size": writer.total_size}, "weight_map": weight_map}
            )
        copy_companions(source, target, leave=frozenset((CONFIG_FILE,)))
        _write_json(target / CONFIG_FILE, dense_config(checkpoint.config))
    return Written(dense_bytes=writer.total_size, stored_bytes=writer.total_size)


@contextmanager
def _opened(source: Path) -> Iterator[tuple[int, Iterable[tuple[str, Tensor]]]]:
    """How many tensors a checkpoint of whatever kind has, and the tensors, one at a time."""
    if is_sparse(read_json(source / CONFIG_FILE)):
        with open_checkpoint(source) as checkpoint:
            yield len(checkpoint.entries), checkpoint
        return
    with closing(Shards(source, dense_files(source))) as shards:
        yield len(shards.file_of), ((name, shards.read(name)) for name in shards.file_of)


def dense_files(source: Path) -> list[str]:
    """Names of the safetensors files of a dense checkpoint.

    :raises SparseCheckpointError: if there are none
    """
    index = source / _DENSE_INDEX
    if index.exists():
        return sorted(set(read_weight_map(index).values()))
    if (source / "model.safetensors").exists():
        return ["model.safetensors"]
    raise SparseCheckpointError(
        f"has neither model.safetensors nor {_DENSE_INDEX}; save the model with transformers first", file=source
    )


def _with_progress(
    tensors: Iterable[tuple[str, Tensor]], total: int, what: str, progress: bool
) -> Iterable[tuple[str, Tensor]]:
    bar: Iterable[tuple[str, Tensor]] = tqdm(tensors, total=total, desc=what, unit="tensor", disable=not progress)
    return bar


def _write_sparse_config(file: Path, config: dict[str, Any], entries: list[TensorEntry]) -> None:
    """``config.json``, with one line a tensor."""
    lines = [f"      {json.dumps(entry.name)}: {json.dumps(entry.to_json())}" for entry in entries]
    table = "{\n" + ",\n".join(lines) + "\n    }"
    placeholder = "table of tensors"
    config = config | HINT | {CONFIG_KEY: {"version": FORMAT_VERSION, "tensors": placeholder}}
    text = json.dumps(config, indent=2, ensure_ascii=False)
    before, _, after = text.rpartition(json.dumps(placeholder))
    file.write_text(f"{before}{table}{after}\n", encoding="utf-8")


def _write_json(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _parse_size(size: int | str) -> int:
    """Bytes of a size like 2000000000, ``"2GB"`` or ``"1.5 GiB"``."""
    match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([A-Za-z]*)\s*", str(size), re.ASCII)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not 1 <= float(match[1]) * unit < 2**63:
        raise ValueError(
            f"max_shard_size is {size!r:.80}; allowed are bytes, or a number with KB, MB, GB, KiB, MiB or GiB, "
            "from 1 byte to less than 2^63"
        )
    return int(float(match[1]) * unit)
