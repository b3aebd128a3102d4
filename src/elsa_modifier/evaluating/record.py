"""``elsa_eval.json``: how good the model beside it is, as ``elsa eval`` writes it and reports read it."""

from pathlib import Path

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from elsa_modifier.whole_files import write_whole
from elsa_sparse.errors import printable
from elsa_sparse.sources import EVALUATION_FILE

__all__ = ["EVALUATION_FILE", "FORMAT", "Agreement", "Evaluation", "Perplexity", "TaskResult"]

FORMAT = 1
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_LARGEST = 10**8  # bytes; whatever is larger is no such file


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Perplexity:
    """Perplexity on a text: documents one after the other, in windows without overlap.

    :param text: what it is called
    :param tokens: that were predicted; one fewer in each window than it has
    :param window: tokens of a window
    :param value: of the model
    :param dense: of the dense model on the same tokens, if it was measured
    """

    text: str
    tokens: NonNegativeInt
    window: NonNegativeInt
    value: PositiveFloat
    dense: PositiveFloat | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Agreement:
    """How much a model's predictions are those of the dense one, on a text's tokens.

    :param text: as in :class:`Perplexity`
    :param top1: fraction of tokens where both find the same one most likely
    :param kl: mean of KL(dense || model) over the full vocabulary, in nats
    """

    text: str
    top1: float = Field(ge=0, le=1)
    kl: float


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TaskResult:
    """One metric of one task of lm-eval.

    :param metric: as lm-eval names it, such as ``acc`` and ``acc_norm``; with its filter, if it has one, after a comma
    :param stderr: standard error, if lm-eval gives one
    :param limit: questions at most that were asked for; None for all
    :param samples: questions that were asked
    :param fewshot: examples that are shown before a question
    """

    task: str
    metric: str
    value: float
    stderr: NonNegativeFloat | None = None
    limit: NonNegativeInt | None = None
    samples: NonNegativeInt | None = None
    fewshot: NonNegativeInt | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Evaluation:
    """All that was measured of a model.

    :param model: directory or name
    :param dense: the model that it is compared with; None if there is none
    :param engine: what computed it: ``transformers``, ``transformers, compressed`` or the address of a server
    :param dtype: of the computation, such as ``float32``; None if a server did it
    :param made: versions by package: ``elsa_modifier``, ``transformers``, ``lm_eval``; None for what was not used
    """

    model: str
    dense: str | None = None
    engine: str = "transformers"
    dtype: str | None = None
    perplexity: tuple[Perplexity, ...] = ()
    agreement: tuple[Agreement, ...] = ()
    tasks: tuple[TaskResult, ...] = ()
    made: dict[str, str | None] = Field(default_factory=dict)
    format: int = Field(default=FORMAT, ge=FORMAT, le=FORMAT)

    @classmethod
    def read(cls, path: str | Path) -> "Evaluation":
        """Out of a file.

        :param path: the file, or the directory that it is in
        :raises OSError: if it cannot be read
        :raises ValueError: if it is not what :meth:`write` writes; the message names the field
        """
        file = _file(path)
        if file.stat().st_size > _LARGEST:
            raise ValueError(f"{printable(file)} is larger than {_LARGEST:,} bytes: no evaluation of a model")
        try:
            return _ADAPTER.validate_json(file.read_bytes())
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            found = printable(first["input"], 100)
            raise ValueError(
                f"{printable(file)}: {printable(where, 200)} is {found}: {printable(first['msg'])}. It is not a file "
                "of this version of elsa-modifier; write it again with `elsa eval`"
            ) from error

    def as_json(self) -> str:
        """What :meth:`write` writes."""
        return _ADAPTER.dump_json(self, indent=1).decode() + "\n"

    def write(self, path: str | Path) -> None:
        """Into a file, all at once: whoever reads it meanwhile finds the old or the new one.

        :param path: the file, or the directory that it is to be in
        :raises OSError: if it cannot be written
        """
        write_whole(_file(path), self.as_json())


_ADAPTER = TypeAdapter(Evaluation)


def _file(path: str | Path) -> Path:
    return Path(path) / EVALUATION_FILE if Path(path).is_dir() else Path(path)
