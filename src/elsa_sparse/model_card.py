"""The README.md of a sparse checkpoint that has none of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elsa_sparse.entry import TensorEntry
from elsa_sparse.opening import architecture_of

__all__ = ["CARD_FILE", "REPORT_MARK", "is_reported", "model_card"]

CARD_FILE = "README.md"
REPORT_MARK = "<!-- Written by elsa-modifier; `elsa report` writes it anew as long as this line is here. -->"


def is_reported(file: Path) -> bool:
    """Whether it is a model card by ``elsa report`` that nobody has made their own."""
    return file.is_file() and REPORT_MARK in file.read_text(encoding="utf-8", errors="replace")


def model_card(config: dict[str, Any], entries: Sequence[TensorEntry], stored_bytes: int) -> str:
    """Markdown: what the checkpoint is, how large, and how to load it.

    :param config: the model's ``config.json``
    :param stored_bytes: of all tensors, as stored
    """
    dense_bytes = sum(entry.dense_bytes for entry in entries)
    pruned = [entry for entry in entries if len(entry.shape) > 1 and entry.sparsity > 0.1]
    weights = sum(entry.dense_bytes for entry in pruned)
    sparsity = sum(entry.sparsity * entry.dense_bytes for entry in pruned) / max(1, weights)
    architecture = architecture_of(config) or "A model"
    return f"""---
library_name: transformers
tags:
- sparse
- elsa-modifier
---

# Sparse checkpoint

{architecture}, {len(pruned)} matrices of which are pruned, to {sparsity:.1%} zeros on average. Stored in
{stored_bytes / 1e6:,.1f} MB; the same tensors dense take {dense_bytes / 1e6:,.1f} MB.

```python
import elsa_modifier  # teaches transformers the format
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this directory")
```

With elsa-modifier installed beside vLLM, `vllm serve` takes the directory as it is. `elsa unpack` turns it into plain
safetensors for any other engine; `elsa inspect` lists its tensors.
"""
