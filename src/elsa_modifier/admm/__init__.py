"""The method: ADMM on a sparsity constraint. Pure torch; knows nothing of language models or llm-compressor."""

from elsa_modifier.admm.budget import SharedBudget
from elsa_modifier.admm.optimizer import ADMMOptimizer, PrunedWeight
from elsa_modifier.admm.penalty import PenaltySchedule
from elsa_modifier.admm.projection import MaskStructure, parse_mask_structure, sparse_mask
from elsa_modifier.admm.state import ADMMState

__all__ = [
    "ADMMOptimizer",
    "ADMMState",
    "MaskStructure",
    "PenaltySchedule",
    "PrunedWeight",
    "SharedBudget",
    "parse_mask_structure",
    "sparse_mask",
]
