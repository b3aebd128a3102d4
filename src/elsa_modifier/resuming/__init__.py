"""Training checkpoints: what a run needs to go on after it was stopped. Not the pruned model that it ends with."""
