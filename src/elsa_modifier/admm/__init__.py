"""The method: ADMM on a sparsity constraint. Pure torch; knows nothing of language models or llm-compressor."""

from elsa_modifier.admm.budget import SharedBudget
from elsa_modifier.admm.constraint import PrunedWeight, SparsitySchedule
from elsa_modifier.admm.optimizer import ADMMOptimizer
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
    "SparsitySchedule",
    "parse_mask_structure",
    "sparse_mask",
]
