from tests.sparse.conftest import edit_config, pruned, sparse

__all__ = ["edit_config", "pruned", "sparse"]
