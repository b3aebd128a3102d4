"""Sparse checkpoints: pack, verify, unpack and serve them. Needs torch, numpy and safetensors.

Apart from ``elsa_modifier``, which offers all of this too, so that a vLLM server need not import what prunes.
"""

from typing import TYPE_CHECKING, Any

from elsa_sparse.checkpoint import SparseCheckpoint
from elsa_sparse.errors import SparseCheckpointError
from elsa_sparse.opening import open_checkpoint
from elsa_sparse.transformers_loading import load_sparse
from elsa_sparse.writing import save_sparse, unpack

if TYPE_CHECKING:
    from elsa_sparse.sparse_linear import SparseLinear
    from elsa_sparse.transformers_quantizer import ElsaSparseConfig

__all__ = [
    "ElsaSparseConfig",
    "SparseCheckpoint",
    "SparseCheckpointError",
    "SparseLinear",
    "load_sparse",
    "open_checkpoint",
    "save_sparse",
    "unpack",
]


def __getattr__(name: str) -> Any:
    """What needs transformers, or is for those who compress, is imported when it is asked for."""
    if name == "ElsaSparseConfig":
        from elsa_sparse.transformers_quantizer import ElsaSparseConfig

        return ElsaSparseConfig
    if name == "SparseLinear":
        from elsa_sparse.sparse_linear import SparseLinear

        return SparseLinear
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
