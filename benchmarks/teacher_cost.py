"""What a teacher adds to a training step of SmolLM2-135M: time of forward and backward for each objective, and memory.

The objectives take turns in one process, in the precision that a run has on this machine; medians, in seconds.
"""

import argparse
import functools
import statistics

import torch
from transformers import AutoModelForCausalLM

from benchmarks.assets import model_directory
from benchmarks.measuring import publish, timed
from elsa_modifier.training.distillation import Distillation, copy_as_teacher
from elsa_modifier.training.model_state import embed_in_fp32
from elsa_modifier.training.objective import Objective, next_token_loss
from elsa_modifier.training.precision import precision_on

# Tokens in each of four sequences.
LENGTHS = (256, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_directory(), dtype=torch.float32)
    teacher = copy_as_teacher(model)
    embed_in_fp32(model)
    precision = precision_on(torch.device("cpu"), "auto")
    objectives: dict[str, Objective] = {
        "`next_token`": next_token_loss,
        "`distill`": Distillation(teacher, next_token=0.5, logits=0.5),
        "`distill_hidden`": Distillation(teacher, next_token=0.5, logits=0.5, hidden=1.0),
    }

    def forward_backward(objective: Objective, ids: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = objective(model, {"input_ids": ids, "labels": ids})
        model.zero_grad()
        loss.backward()

    seconds: dict[tuple[str, int], float] = {}
    for length in LENGTHS:
        ids = torch.randint(0, model.config.vocab_size, (4, length))
        passes = {name: functools.partial(forward_backward, objective, ids) for name, objective in objectives.items()}
        next(iter(passes.values()))()  # the first one allocates
        rounds = [{name: timed(run) for name, run in passes.items()} for _ in range(arguments.repeats)]
        seconds |= {(name, length): statistics.median(times[name] for times in rounds) for name in passes}

    held = sum(parameter.nbytes for parameter in teacher.parameters())
    lines = [
        "# What a teacher costs",
        "",
        f"SmolLM2-135M, forward and backward in {precision}, {torch.get_num_threads()} threads, medians of "
        f"{arguments.repeats}; in brackets, times the next-token loss alone. The teacher holds {held / 1e6:.0f} MB.",
        "",
        "`python -m benchmarks.teacher_cost` prints and writes this.",
        "",
        "| objective | " + " | ".join(f"4 x {length}, s" for length in LENGTHS) + " |",
        "|---" * (1 + len(LENGTHS)) + "|",
    ]
    for name in objectives:
        cells = [
            f"{seconds[name, length]:.2f} ({seconds[name, length] / seconds['`next_token`', length]:.2f} x)"
            for length in LENGTHS
        ]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    publish("teacher_cost", lines)


if __name__ == "__main__":
    main()
