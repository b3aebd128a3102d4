"""The one error of this package."""

from pathlib import Path

__all__ = ["SparseCheckpointError"]


class SparseCheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names the file and, where there is one, the tensor."""

    def __init__(self, problem: str, *, file: str | Path | None = None, tensor: str | None = None) -> None:
        where = [str(file)] if file is not None else []
        where += [f"tensor {tensor}"] if tensor is not None else []
        super().__init__(": ".join([*where, problem]))
