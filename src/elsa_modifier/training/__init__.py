"""The training run that ELSA needs and llm-compressor does not have: data, objective, loop, and the model's state."""
