"""``python -m elsa_cli``, which is also how a launcher of several processes starts the ``elsa`` command."""

from elsa_cli.main import app

app(prog_name="elsa")
