"""ELSA for llm-compressor: prune language models to 50-95% sparsity on their true loss.

Importing this package makes ``ELSAModifier`` a name that recipes can use, sparse checkpoints something that
transformers' ``from_pretrained`` takes, and conversations a dataset that ``oneshot`` takes.
"""

from llmcompressor.modifiers.factory import ModifierFactory

from elsa_modifier.fields import Budget, Penalty
from elsa_modifier.modifier import ELSAModifier
from elsa_modifier.named_recipes import recipe, recipes
from elsa_modifier.quantization.modifier import MaskedGPTQModifier
from elsa_modifier.sparsity_files import sparsity_mapping
from elsa_modifier.texts.windows import load_texts
from elsa_modifier.training.conversations import teach_chat_templates
from elsa_modifier.training.loading import load_for_ranks
from elsa_sparse import SparseCheckpointError, load_sparse, save_sparse
from elsa_sparse.transformers_loading import teach_from_pretrained
from elsa_sparse.transformers_quantizer import ElsaSparseConfig

__all__ = [
    "Budget",
    "ELSAModifier",
    "ElsaSparseConfig",
    "MaskedGPTQModifier",
    "Penalty",
    "SparseCheckpointError",
    "load_for_ranks",
    "load_sparse",
    "load_texts",
    "recipe",
    "recipes",
    "save_sparse",
    "sparsity_mapping",
]

__version__ = "0.1.0"

# Under the class's own name, since that is what recipe.yaml is written with.
for _modifier in (ELSAModifier, MaskedGPTQModifier):
    ModifierFactory.register(_modifier.__name__, _modifier)
teach_from_pretrained()
teach_chat_templates()
