"""Packing a checkpoint into the sparse format, and unpacking it to plain safetensors: shard by shard, atomically."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from elsa_sparse.atomic import Staging, staged
from elsa_sparse.checkpoint import CONFIG_FILE, CONFIG_KEY, Shards, read_json, read_weight_map
from elsa_sparse.entry import ENCODINGS, Encoding, TensorEntry, encode
from elsa_sparse.errors import SparseCheckpointError
from elsa_sparse.model_card import CARD_FILE, model_card
from elsa_sparse.opening import HINT, dense_config, is_sparse, open_checkpoint
from elsa_sparse.owned import sha256_of
from elsa_sparse.sources import companions, copy_companions, forget_findings, unchanged
from elsa_sparse.symbols import count_negative_zeros
from elsa_sparse.table import shard_names, table_as_json

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

    def __init__(self, directory: Path, shard_size: int) -> None:
        self._directory, self._shard_size = directory, shard_size
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self.files: list[Path] = []
        self.parts: list[list[str]] = []
        self.total_size = 0

    def add(self, parts: dict[str, Tensor]) -> int:
        """Parts of one tensor, which stay together in a file; the file's index."""
        size = sum(part.numel() * part.element_size() for part in parts.values())
        if self._pending and self._pending_bytes + size > self._shard_size:
            self._write()
        self._pending |= parts
        self._pending_bytes += size
        return len(self.files)

    def _write(self) -> None:
        file = self._directory / f"{len(self.files)}.safetensors"
        try:
            save_file(self._pending, file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{file} cannot be written: {error}") from error
        self.files.append(file)
        self.parts.append(list(self._pending))
        self.total_size += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> None:
        """Write what is left."""
        if self._pending or not self.files:
            self._write()


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

    ``out_dir`` appears at once and complete, or not at all; an older checkpoint there stays whole until then. Files in
    it that this package did not write are neither replaced nor deleted. A tensor that would not get smaller is stored
    dense. Tokenizer, generation config, recipe and model card of a directory travel along; a model card is written
    where there is none.

    :param model_or_dir: a transformers model, which is first saved as usual in a temporary directory inside
        ``out_dir``, or a directory with a checkpoint in safetensors: dense, quantized, or sparse itself
    :param out_dir: directory to write
    :param encoding: ``coded`` (smallest), or ``bitmask`` (the layout of compressed-tensors up to 0.14, faster to read)
    :param bit_equal: keep the sign of zeros too: a weight pruned by a product with its mask is -0.0 where it was
        negative, which then takes as much as a weight that is kept
    :param max_shard_size: of a file, in bytes or like ``"2GB"``; also the memory that packing needs beyond one tensor
    :param overwrite: allow that ``out_dir`` exists and is not empty: a sparse checkpoint there is replaced
    :param progress: show a progress bar
    :raises SparseCheckpointError: if the source cannot be read, holds what cannot be stored, or changes meanwhile
    :raises FileExistsError: if ``out_dir`` may not be overwritten, or has someone else's files where others must go
    :raises ValueError: if ``encoding`` or ``max_shard_size`` is not what it may be
    """
    if isinstance(model_or_dir, (str, Path)):
        shard_size = _checked(encoding, max_shard_size)
        with staged(Path(out_dir), overwrite=overwrite) as staging:
            return _pack(Path(model_or_dir), staging, encoding, bit_equal, shard_size, progress)
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
    with staged(Path(out_dir), overwrite=overwrite) as staging:
        dense = staging.scratch / "dense"
        dense.mkdir()
        save_dense(dense)
        return _pack(dense, staging, encoding, bit_equal, shard_size, progress)


def _checked(encoding: Encoding, max_shard_size: int | str) -> int:
    if encoding not in ENCODINGS or encoding == "dense":
        raise ValueError(f"encoding is {encoding!r}; allowed are 'coded' and 'bitmask'")
    return _parse_size(max_shard_size)


def _pack(
    source: Path, staging: Staging, encoding: Encoding, bit_equal: bool, shard_size: int, progress: bool
) -> Written:
    """Put a directory's checkpoint in the place of the one that is there."""
    writer = _ShardWriter(staging.scratch, shard_size)
    entries: list[tuple[TensorEntry, int]] = []
    signs = 0
    with unchanged(source, staging.directory):
        config = dense_config(read_json(source / CONFIG_FILE))
        _check_companions(source, staging)
        with _opened(source) as (count, tensors):
            for name, tensor in _with_progress(tensors, count, "pack", progress):
                # Where the configuration ties embeddings, a head in the checkpoint tells vLLM that they are not tied;
                # it looks for it by its name.
                untied = name.endswith("lm_head.weight") and config.get("tie_word_embeddings", False)
                entry, parts = encode(name, tensor, "dense" if untied else encoding, bit_equal=bit_equal)
                if entry.encoding != "dense" and not bit_equal:
                    signs += count_negative_zeros(tensor)
                entries.append((entry, writer.add({entry.parts[part]: stored for part, stored in parts.items()})))
        writer.finish()
        copy_companions(source, staging.directory, staging.new)
    if len({part for parts in writer.parts for part in parts}) != sum(len(entry.parts) for entry, _ in entries):
        raise SparseCheckpointError("two of its tensors would be stored under the same name", file=source)
    if not (staging.new / CARD_FILE).exists() and staging.is_free(CARD_FILE):
        card = model_card(config, [entry for entry, _ in entries], writer.total_size)
        (staging.new / CARD_FILE).write_text(card, encoding="utf-8")
    files = staging.settle()
    hashes = [sha256_of(file) for file in writer.files]
    for file, name, sha256 in zip(writer.files, shard_names(hashes, files), hashes, strict=True):
        file.rename(staging.new / name)
        files = files | {name: sha256}
    _write_sparse_config(staging.new / CONFIG_FILE, config, table_as_json(files, entries))
    staging.commit(files)
    forget_findings(staging.directory)
    dense_bytes = sum(entry.dense_bytes for entry, _ in entries)
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

    :param overwrite: allow that ``out_dir`` exists and is not empty; only a sparse checkpoint there is replaced
    :raises SparseCheckpointError: if the checkpoint is not sparse, not what it should be, or changes meanwhile
    :raises FileExistsError: as :func:`save_sparse`
    """
    source, shard_size = Path(directory), _parse_size(max_shard_size)
    with staged(Path(out_dir), overwrite=overwrite) as staging:
        writer = _ShardWriter(staging.scratch, shard_size)
        with unchanged(source, staging.directory), open_checkpoint(source) as checkpoint:
            _check_companions(source, staging)
            for name, tensor in _with_progress(checkpoint, len(checkpoint.entries), "unpack", progress):
                writer.add({name: tensor})
            writer.finish()
            copy_companions(source, staging.directory, staging.new)
        count = len(writer.files)
        weight_map: dict[str, str] = {}
        for i, (file, names) in enumerate(zip(writer.files, writer.parts, strict=True)):
            final = "model.safetensors" if count == 1 else f"model-{i + 1:05}-of-{count:05}.safetensors"
            file.rename(staging.new / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": writer.total_size}, "weight_map": dict(sorted(weight_map.items()))}
            _write_json(staging.new / _DENSE_INDEX, index)
        files = staging.settle()
        _write_json(staging.new / CONFIG_FILE, dense_config(checkpoint.config))
        staging.commit(files)
        forget_findings(staging.directory)
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


def _check_companions(source: Path, staging: Staging) -> None:
    """Refuse before any work what could not be put in its place after it."""
    for name in companions(source, staging.directory):
        staging.allows(name, source / name)


def _write_sparse_config(file: Path, config: dict[str, Any], table: str) -> None:
    placeholder = "table of tensors"
    text = json.dumps(config | HINT | {CONFIG_KEY: placeholder}, indent=2, ensure_ascii=False)
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
