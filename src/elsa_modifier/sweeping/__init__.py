"""One model at several sparsities, for ``elsa sweep``: perplexity against sparsity, as the paper's figure 1."""
