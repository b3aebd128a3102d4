"""A whole pruning run, from text files to a report, for ``elsa prune``."""
