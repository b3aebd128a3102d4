from tests.sparse.conftest import pruned

__all__ = ["pruned"]
