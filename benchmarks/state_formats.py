"""What low precision costs: SmolLM2-135M pruned with each state format and optimizer, the same text and tokens. Writes
``docs/results/state_formats.md``.
"""

import argparse
import statistics
from collections import defaultdict
from typing import Any, get_args

from benchmarks.measuring import BUDGET, Results, publish
from elsa_modifier import ELSAModifier
from elsa_modifier.admm.storage import StateDtype
from elsa_modifier.training.base_optimizer import LOW_BIT_OPTIMIZERS

VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    # Without a dual there is no state to be held in any of them.
    **{f"state {name}": {"state_dtype": name, "penalty": {"dual": True}} for name in get_args(StateDtype)},
    **{f"optimizer {name}": {"optimizer": name} for name in LOW_BIT_OPTIMIZERS},
    "bf16 weights, adam8bit_sr (elsa_l)": {
        "weight_dtype": "bf16",
        "optimizer": "adam8bit_sr",
    },
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
    runs: dict[tuple[float, str], dict[int, dict[str, Any]]] = defaultdict(dict)
    for (label, sparsity), row in results.latest().items():
        variant, seed = label.split(", seed ")
        runs[sparsity, variant][int(seed)] = row
    lines = [
        "# State formats and optimizers",
        "",
        f"`python -m benchmarks.state_formats`: SmolLM2-135M, {BUDGET['steps']} steps of {BUDGET['batch_size']} x "
        f"{BUDGET['sequence_length']} tokens. Perplexity on held-out C4 and Wikipedia with each seed, and the mean of "
        "the ratios to fp32 with the same seed.",
        "",
        "| sparsity | variant | seeds | C4 | Wikipedia | C4 over fp32 | Wikipedia over fp32 |",
        "|---" * 7 + "|",
    ]
    for sparsity, variant in sorted(runs, key=lambda key: (key[0], list(VARIANTS).index(key[1]))):
        of_seeds, exact = runs[sparsity, variant], runs[sparsity, "fp32"]
        seeds = sorted(of_seeds)
        cells = [f"{sparsity:.0%}", variant, ", ".join(map(str, seeds))]
        cells += [", ".join(f"{of_seeds[seed][text]:,.1f}" for seed in seeds) for text in results.held_out]
        for text in results.held_out:
            ratios = [of_seeds[seed][text] / exact[seed][text] for seed in seeds if seed in exact]
            cells.append(f"{statistics.geometric_mean(ratios):.3f}" if ratios else "")
        lines.append("| " + " | ".join(cells) + " |")
    publish("state_formats", lines)


if __name__ == "__main__":
    main()
