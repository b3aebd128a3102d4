"""What a run has come to, to be shown: a page, figures and a model card, for ``elsa report``."""
