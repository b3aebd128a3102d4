"""ELSA for llm-compressor: prune language models to 50-95% sparsity on their true loss.

Importing this package makes ``ELSAModifier`` a name that recipes can use.
"""

from llmcompressor.modifiers.factory import ModifierFactory

from elsa_modifier.modifier import ELSAModifier, Penalty

__all__ = ["ELSAModifier", "Penalty"]

__version__ = "0.1.0"

# Under the class's own name, since that is what recipe.yaml is written with.
ModifierFactory.register(ELSAModifier.__name__, ELSAModifier)
