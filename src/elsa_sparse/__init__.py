"""Sparse checkpoints: pack, verify, unpack and serve them. Needs torch, numpy and safetensors.

Apart from ``elsa_modifier``, which offers all of this too, so that a vLLM server need not import what prunes.
"""

from elsa_sparse.checkpoint import SparseCheckpoint
from elsa_sparse.errors import SparseCheckpointError
from elsa_sparse.opening import open_checkpoint
from elsa_sparse.transformers_loading import load_sparse
from elsa_sparse.writing import save_sparse, unpack

__all__ = ["SparseCheckpoint", "SparseCheckpointError", "load_sparse", "open_checkpoint", "save_sparse", "unpack"]
