"""What becomes of modifiers in one recipe: the cases that the tests run, and docs/composition.md shows.

``python -m tests.quantization.composition`` writes that document.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

from elsa_modifier import ELSAModifier, MaskedGPTQModifier

DOCUMENT = Path(__file__).parents[2] / "docs" / "composition.md"

W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
QUANTIZERS = {"GPTQ": GPTQModifier, "MaskedGPTQ": MaskedGPTQModifier, "QuantizationModifier": QuantizationModifier}
PRUNERS = {"SparseGPT": SparseGPTModifier, "Wanda": WandaPruningModifier}
SCALERS = ("SmoothQuant", "AWQ")
NAMES = (*PRUNERS, "ELSA", *SCALERS, *QUANTIZERS)
OURS = {"ELSA", "MaskedGPTQ"}

# What the refusal says, and why it is one.
REASONS = {
    "put ELSAModifier first": "ELSA trains every weight, and would leave none on the quantizer's grid",
    "would choose a second mask": "the later pruner would choose zeros beside those of ELSA, more than was asked for",
    "which MaskedGPTQModifier has quantized before it; put": "pruning after quantization moves weights off the grid",
    "would scale what": "scaling after quantization moves weights off the grid",
    "both quantize": "llm-compressor gives a weight the scheme of the last quantizer before the first one runs",
    "AWQ must be run with a subsequent quantization modifier": "llm-compressor's own: AWQ fits scales to a scheme",
}
_FIRST, _MASK, _PRUNED, _SCALED, _BOTH, _AWQ = REASONS


@dataclass(frozen=True)
class Case:
    """A recipe, by the names of its modifiers, and what refuses it: one of the reasons, or None."""

    names: tuple[str, ...]
    refused: str | None = None

    def __str__(self) -> str:
        return "-".join(self.names)

    def recipe(self) -> list[Modifier]:
        """Modifiers for a tiny model; a first ELSA of two prunes half, and ELSA otherwise 80%."""
        last = len(self.names) - 1 - self.names[::-1].index("ELSA") if "ELSA" in self.names else None
        return [_modifier(name, 0.8 if i == last else 0.5) for i, name in enumerate(self.names)]


def _modifier(name: str, sparsity: float) -> Modifier:
    if name == "ELSA":
        # Its first loss tells whether the model is what it was; the divergence from a teacher that is the model is 0.
        fields = dict(steps=4, batch_size=2, sequence_length=16, precision="fp32", lr=1e-3, objective="next_token")
        fields |= dict(shared_budget=False)
        return ELSAModifier(sparsity=sparsity, **fields)
    if name in PRUNERS:
        return PRUNERS[name](sparsity=0.5, ignore=["re:.*lm_head"])
    if name in QUANTIZERS:
        return QUANTIZERS[name](config_groups={"w4": {"targets": ["Linear"], "weights": W4}}, ignore=["lm_head"])
    return SmoothQuantModifier() if name == "SmoothQuant" else AWQModifier(n_grid=4)


def _refusal(earlier: str, later: str) -> str | None:
    if later == "AWQ" or (earlier == "AWQ" and later not in QUANTIZERS):
        return _AWQ
    if earlier in QUANTIZERS:
        return _FIRST if later == "ELSA" else _PRUNED if later in PRUNERS else _SCALED if later in SCALERS else _BOTH
    return _MASK if earlier == "ELSA" and later in PRUNERS else None


PAIRS = [Case(pair, _refusal(*pair)) for pair in product(NAMES, NAMES) if OURS & set(pair)]

TRIPLES = [
    *(Case((first, "ELSA", last)) for first in (*PRUNERS, *SCALERS, "ELSA") for last in QUANTIZERS),
    *(Case(("ELSA", scaler, last)) for scaler in SCALERS for last in QUANTIZERS),
    *(Case((pruner, scaler, "MaskedGPTQ")) for pruner in PRUNERS for scaler in SCALERS),
    *(Case((scaler, pruner, "MaskedGPTQ")) for pruner in PRUNERS for scaler in SCALERS),
    Case(("SparseGPT", "Wanda", "MaskedGPTQ")),
    Case(("ELSA", "SmoothQuant", "ELSA")),
    Case(("ELSA", "Wanda", "GPTQ"), _MASK),
    Case(("ELSA", "GPTQ", "SmoothQuant"), _SCALED),
    Case(("ELSA", "QuantizationModifier", "GPTQ"), _BOTH),
    Case(("SmoothQuant", "GPTQ", "ELSA"), _FIRST),
]

_TEXT = """\
# With llm-compressor's other modifiers

Written by `python -m tests.quantization.composition` from the cases that `tests/quantization/test_composition.py` runs.
Rows come first in the recipe, columns after them; pairs with neither ELSA nor MaskedGPTQ are llm-compressor's own.

{table}

*Right*: the zeros of the last ELSA, exactly as many as asked for, are there at the end; weights are on the grid of the
quantizer, or its scales fit them (QuantizationModifier rounds when the model is saved); ELSA's losses are those of the
same recipe without what follows it.

*Refused*: before the first step, in words that say what to change.

{reasons}

Longer recipes follow from their pairs. These are run too:

| recipe | |
|---|---|
{triples}

Of two ELSAModifiers the last decides: it starts from the weights that the first has pruned, may let some of them grow
back, and ends with exactly the zeros that its own `sparsity` asks for. Its `checkpoint` and its history are saved.

Two quantizers, a pruner after ELSA, and a pruner after a quantizer are refused for the weights that both touch:
`targets` and `ignore` can part them. ELSA trains all weights, so no quantizer can come before it, and it must prune
every weight that a pruner, or another ELSA, has pruned before it.

Also refused: QuIP and SpinQuant with ELSA; REAP after it, since it numbers experts anew; a `group_size` that does not
divide a width; a GPTQModifier without weights to quantize. With `pipeline="sequential"` ELSA trains before any other
modifier has done its work, wherever it stands, and the recipe is checked in that order.
"""


def document() -> str:
    """docs/composition.md."""
    outcomes = {case.names: case for case in PAIRS}
    numbers = {reason: i for i, reason in enumerate(REASONS, 1)}

    def cell(earlier: str, later: str) -> str:
        case = outcomes.get((earlier, later))
        return "" if case is None else "right" if case.refused is None else f"refused ({numbers[case.refused]})"

    table = [
        "| | " + " | ".join(NAMES) + " |",
        "|---" * (1 + len(NAMES)) + "|",
        *(f"| **{a}** | " + " | ".join(cell(a, b) for b in NAMES) + " |" for a in NAMES),
    ]
    reasons = [f"{i}. {why}" for i, why in enumerate(REASONS.values(), 1)]
    triples = [
        f"| {', '.join(c.names)} | {f'refused ({numbers[c.refused]})' if c.refused else 'right'} |" for c in TRIPLES
    ]
    return _TEXT.format(table="\n".join(table), reasons="\n".join(reasons), triples="\n".join(triples))


if __name__ == "__main__":
    DOCUMENT.write_text(document())
