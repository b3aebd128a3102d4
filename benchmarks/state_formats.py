"""What low precision costs: SmolLM2-135M pruned with each state format and optimizer, the same text and tokens. Writes
``docs/results/state_formats.md``.
"""

import argparse
from typing import Any, get_args

from benchmarks.measuring import BUDGET, Results, publish
from elsa_modifier import ELSAModifier
from elsa_modifier.admm.storage import StateDtype
from elsa_modifier.training.base_optimizer import LOW_BIT_OPTIMIZERS

_BF16 = {"weight_dtype": "bf16", "optimizer": "adam8bit_sr"}
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    **{f"state {name}": {"state_dtype": name} for name in get_args(StateDtype) if name != "fp32"},
    **{f"optimizer {name}": {"optimizer": name} for name in LOW_BIT_OPTIMIZERS},
    "bf16 weights, adam8bit_sr": _BF16,
    "bf16 weights, adam8bit_sr, int8 (elsa_l)": _BF16 | {"state_dtype": "int8"},
    "bf16 weights, adam8bit_sr, float8_e4m3fn": _BF16 | {"state_dtype": "float8_e4m3fn"},
    "bf16 weights, adam8bit, int8": _BF16 | {"optimizer": "adam8bit", "state_dtype": "int8"},
    "bf16 weights, adamfp8, int8": _BF16 | {"optimizer": "adamfp8", "state_dtype": "int8"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, nargs="+", default=(0.8, 0.9))
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--seed", type=int, nargs="+", default=(0,), help="more than one say how much of it is chance")
    parser.add_argument("--publish", action="store_true", help="write the page from what was measured before")
    arguments = parser.parse_args()
    results = Results("state_formats")
    if not arguments.publish:
        for sparsity in arguments.sparsity:
            for variant in arguments.variant:
                for seed in arguments.seed:
                    modifier = ELSAModifier(sparsity=sparsity, seed=seed, **BUDGET, **VARIANTS[variant])
                    results.measure(f"{variant}, seed {seed}", sparsity, modifier)
    _publish(results)


def _publish(results: Results) -> None:
    latest = results.latest()
    lines = [
        "# State formats and optimizers",
        "",
        f"`python -m benchmarks.state_formats`: SmolLM2-135M, {BUDGET['steps']} steps of {BUDGET['batch_size']} x "
        f"{BUDGET['sequence_length']} tokens. Perplexity on held-out C4 / Wikipedia, and over fp32's of the same seed.",
        "",
        "| sparsity | variant | seed | C4 | Wikipedia | over fp32 |",
        "|---" * 6 + "|",
    ]
    order = list(VARIANTS)
    for label, sparsity in sorted(latest, key=lambda key: (key[1], order.index(key[0].split(", seed ")[0]), key[0])):
        row = latest[label, sparsity]
        variant, seed = label.split(", seed ")
        exact = latest.get((f"fp32, seed {seed}", sparsity))
        ratio = f"{row['C4'] / exact['C4']:.3f} / {row['Wikipedia'] / exact['Wikipedia']:.3f}" if exact else ""
        lines.append(f"| {sparsity:.0%} | {variant} | {seed} | {row['C4']:,.1f} | {row['Wikipedia']:,.1f} | {ratio} |")
    publish("state_formats", lines)


if __name__ == "__main__":
    main()
