"""``elsa_prune.json``: what a run of ``elsa prune`` has come to, beside the model that it made."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from elsa_modifier.whole_files import write_whole
from elsa_sparse.errors import printable
from elsa_sparse.files import MAX_JSON_BYTES, read_bounded

__all__ = ["SUMMARY_FILE", "Summary"]

SUMMARY_FILE = "elsa_prune.json"


@dataclass(frozen=True)
class Summary:
    """What a run has come to.

    :param sparsity: fraction of zeros over the weights that were pruned
    :param perplexity_before: on text that was held out; None if there was too little
    :param held_out_tokens: that it was measured on
    :param training_tokens: of the text that was trained on
    :param epochs: how often the run went over them
    :param seconds: of this process, from loading to saving
    :param training_seconds: of all steps, in this process and those before it
    :param memory: most that was held by the first process, bytes of main memory; ``device_memory`` of an accelerator's,
        or None
    :param model, history, checkpoints, metrics: where these are; None where there is none
    :param base, data, recipe: what the run was given, as it was given; None in files that do not say
    :param processes: that trained
    :param steps, tokens: optimizer steps, and tokens that they predicted, in this process and those before it
    :param checkpoint_bytes: on disk, of the training checkpoints that there are now
    :param base_on_hub, data_on_hub: whether that is a name on the hub, and no file or directory
    """

    sparsity: float
    perplexity_before: float | None
    perplexity_after: float | None
    held_out_tokens: int
    training_tokens: int
    epochs: float
    seconds: float
    training_seconds: float
    memory: int
    device_memory: int | None
    model: str
    history: str
    checkpoints: str | None
    metrics: str | None
    base: str | None = None
    data: str | None = None
    recipe: str | None = None
    base_on_hub: bool = False
    data_on_hub: bool = False
    processes: int = 1
    steps: int = 0
    tokens: int = 0
    checkpoint_bytes: int = 0

    def write(self, directory: Path) -> None:
        """Into a directory, all at once.

        :raises OSError: if it cannot be written
        """
        write_whole(directory / SUMMARY_FILE, _ADAPTER.dump_json(self, indent=1).decode() + "\n")

    @classmethod
    def read(cls, directory: Path) -> "Summary | None":
        """Out of a directory; None if there is none.

        :raises ValueError: if it is not what :meth:`write` writes
        """
        file = directory / SUMMARY_FILE
        if not file.exists():
            return None
        try:
            return _ADAPTER.validate_json(read_bounded(file, MAX_JSON_BYTES))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = printable(".".join(map(str, first["loc"])) or "the file", 200)
            raise ValueError(
                f"{printable(file)}: {where}: {printable(first['msg'])}. `elsa prune` writes this file; delete it to "
                "go on without"
            ) from error


_ADAPTER = TypeAdapter(Summary)
