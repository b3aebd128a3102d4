"""``elsa lm-eval``: lm-eval's own command, in a process that reads sparse directories."""

import sys

import typer

from elsa_cli.output import errors_in_words

__all__ = ["SETTINGS", "lm_eval"]

# All that follows is lm-eval's, --help too.
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def lm_eval(context: typer.Context) -> None:
    """Run lm-eval with arguments of its own; --model hf then takes sparse directories too."""
    with errors_in_words():
        try:
            from lm_eval.__main__ import cli_evaluate
        except ModuleNotFoundError as error:
            if error.name != "lm_eval":
                raise
            raise ValueError("lm-eval is not installed: `pip install 'elsa-modifier[eval]'`") from error
    from elsa_sparse.transformers_loading import teach_from_pretrained

    teach_from_pretrained()
    sys.argv = ["lm_eval", *context.args]
    cli_evaluate()
