"""How good a model is: perplexity, agreement with the dense model, zero-shot tasks; for ``elsa eval``."""
