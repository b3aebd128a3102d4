"""The compiled library, if there is one that works here."""

__all__ = ["backend"]


def backend() -> str:
    """What computes on this machine: "avx512+amx", "avx512", "avx2", "portable", or "torch" without the library."""
    return "torch"
