"""Checksums of tensors."""

import hashlib

import torch
from torch import Tensor

__all__ = ["sha256_of", "tensor_bytes"]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's entries in order, of which a copy is made only if it is not on the CPU or contiguous."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def sha256_of(*tensors: Tensor) -> str:
    """Of dtypes, shapes and entries, in hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
