"""One of several ranks is ended by SIGKILL: does the launcher end all, and what does a run that goes on come to?

The launcher is the one inside of ``torchrun`` (``torch.distributed.launcher``), in a process of its own. Its ranks,
joined by gloo, are forks of it, so that none has to import everything anew.
"""

import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from benchmarks.killing import (
    VARIANTS,
    being_written,
    count,
    fork,
    last_step,
    moment,
    prune,
    same_history,
    same_weights,
    step_to_kill_at,
    wait_for,
    write_to,
)
from elsa_modifier.resuming.directory import complete_checkpoints
from elsa_modifier.resuming.manifest import read_verified

# Numbers of ranks that a run had one after the other.
CHANGES = ((2, 1), (2, 4), (4, 2), (1, 2), (2, 4, 1))
# Under autocast a difference in a weight's last place may become one in bf16's.
EXACT = {"precision": "fp32", "batch_size": 4}
# A launcher that has not ended by then hangs. It gives ranks 30 seconds to end by themselves.
PATIENCE = 90.0


def rows(directory: Path, ranks: int, changes: int) -> Iterator[dict[str, Any]]:
    """What came of runs of which a rank was killed, and of those that went on on another number of ranks."""
    variants = list(VARIANTS.values())
    references = {n: reference(directory, n, 2, variants[n][1]) for n in range(min(ranks, len(variants)))}
    for seed in range(ranks):
        yield kill_a_rank(directory, seed, references, 2)
    chosen = [CHANGES[seed % len(CHANGES)] for seed in range(changes)]
    wholes = {n: reference(directory, 0, n, EXACT)[0] for n in sorted({n for counts in chosen for n in counts})}
    for seed, counts in enumerate(chosen):
        ends = {counts[0], counts[-1]}
        yield change_the_number(directory, seed, counts, {n: whole for n, whole in wholes.items() if n in ends})


def page(ranks: list[dict[str, Any]], changed: list[dict[str, Any]]) -> list[str]:
    """The page's part."""
    ends = [end for row in [*ranks, *changed] for end in row["ends"]]
    kills: Counter[str] = sum((Counter(row["kills"]) for row in ranks), Counter())
    bits = [found["bits"] for row in changed for found in row["against"].values()]
    lines = [
        "",
        "## One rank of two",
        "",
        f"{len(ranks)} such runs on 2 ranks (FSDP2, gloo, the launcher of `torchrun`). One rank of the two, drawn, is "
        "killed, once or twice a run; then the same command goes on.",
        "",
        f"Final weights the same bits as those of a run on 2 ranks that nothing had cut off: "
        f"**{count(ranks, 'same_weights')} of {len(ranks)}**. Histories the same: {count(ranks, 'same_history')} of "
        f"{len(ranks)}. The launcher ended with an error, and not by being waited for in vain, after "
        f"{count(ends, 'ended')} of {len(ends)} kills, in this table and the next one, and said which process had been "
        f"killed after {count(ends, 'told')}; it took at most {max(end['seconds'] for end in ends):.1f} s.",
        "",
        f"{kills.total()} kills: " + ", ".join(f"{n} {when}" for when, n in sorted(kills.items())) + ".",
        "",
        "| run | killed ranks | went on after steps | seconds until all had ended | same weights |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['variant']} | {', '.join(str(end['rank']) for end in row['ends'])} | "
        f"{', '.join(map(str, row['resumed_from']))} | {', '.join(str(end['seconds']) for end in row['ends'])} | "
        f"{'yes' if row['same_weights'] else '**no**'} |"
        for row in ranks
    ]
    lines += [
        "",
        "## Another number of ranks",
        "",
        f"{len(changed)} runs of Adam in fp32, without autocast, of which a rank was killed, and that another number "
        "of ranks went on with. Compared with runs that nothing had cut off, on as many ranks as at the beginning and "
        "at the end: the relative difference of all weights together, and the bits of the masks.",
        "",
        "| ranks | went on after steps | against | weights | bits that differ |",
        "|---|---|---|---|---|",
    ]
    for row in changed:
        title = f"{' -> '.join(map(str, row['changes']))} | {', '.join(map(str, row['resumed_from']))}"
        for number, found in row["against"].items():
            cells = f"{number} | {found['difference']:.1e} | {found['bits']} of {found['entries']:,}"
            lines.append(f"| {title} | {cells} |")
            title = " | "
    if any(bits):
        lines += [
            "",
            "Ranks add gradients up in another order. Where two scores are equal up to that, another one of them is "
            "kept: a bit of each differs, and with it the weights by their values.",
        ]
    return lines


def launch(directory: Path, number: int, out: str, fields: dict[str, Any], ranks: int) -> None:
    """In a process of its own: start ranks, and end with them."""
    write_to(directory / "log")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=out,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="fork",
    )
    elastic_launch(config, _rank)(directory, number, out, fields)


def _rank(directory: Path, number: int, out: str, fields: dict[str, Any]) -> None:
    (directory / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    prune(directory, number, out, fields)


def reference(directory: Path, number: int, ranks: int, fields: dict[str, Any]) -> tuple[str, float]:
    """A run on ranks that nothing cuts off: its directory, and the seconds that it took."""
    out = f"reference-{number}-{ranks}-{len(fields)}"
    began = time.monotonic()
    wait_for(_started(directory, number, out, fields, ranks), directory)
    return out, time.monotonic() - began


def kill_a_rank(directory: Path, seed: int, references: dict[int, tuple[str, float]], ranks: int) -> dict[str, Any]:
    """One run, of which a rank is killed once or twice at moments drawn from the seed, and what came out of it."""
    number = seed % len(VARIANTS)
    drawn = random.Random(1000 + seed)
    out = f"ranks-{seed}"
    fields = list(VARIANTS.values())[number][1]
    expected, seconds = references[number]
    kills, ends, resumed_from = Counter[str](), list[dict[str, Any]](), list[int]()
    wanted = drawn.randint(1, 2)
    while len(ends) < wanted:
        resumed_from.append(last_step(directory / f"{out}-training"))
        found = _killed(directory, number, out, fields, ranks, drawn, seconds, in_writing=bool((seed + len(ends)) % 2))
        if found is None and ends:
            break
        if found is None:
            # Over before it was killed at all.
            shutil.rmtree(directory / f"{out}-training")
            resumed_from.clear()
            continue
        kills[found.pop("moment")] += 1
        ends.append(found)
    resumed_from.append(last_step(directory / f"{out}-training"))
    wait_for(_started(directory, number, out, fields, ranks), directory)
    return {
        "ranks": ranks,
        "variant": list(VARIANTS)[number],
        "seed": seed,
        "resumed_from": resumed_from,
        "kills": dict(kills),
        "ends": ends,
        "same_weights": same_weights(directory / out, directory / expected),
        "same_history": same_history(directory / out, directory / expected),
    }


def change_the_number(directory: Path, seed: int, counts: tuple[int, ...], wholes: dict[int, str]) -> dict[str, Any]:
    """One run that goes on on another number of ranks after each kill, compared with runs that nothing cut off.

    :param wholes: directories of those, by their number of ranks
    """
    drawn = random.Random(2000 + seed)
    out = f"changed-{seed}"
    kills, ends, resumed_from = Counter[str](), list[dict[str, Any]](), list[int]()
    for ranks in counts[:-1]:
        resumed_from.append(last_step(directory / f"{out}-training"))
        found = _killed(directory, 0, out, EXACT, ranks, drawn, 0.0, in_writing=True)
        assert found is not None
        kills[found.pop("moment")] += 1
        ends.append(found)
    resumed_from.append(last_step(directory / f"{out}-training"))
    wait_for(_started(directory, 0, out, EXACT, counts[-1]), directory)
    return {
        "changes": counts,
        "seed": seed,
        "resumed_from": resumed_from,
        "kills": dict(kills),
        "ends": ends,
        "against": {ranks: _compared(directory / out, directory / whole) for ranks, whole in wholes.items()},
    }


def _started(directory: Path, number: int, out: str, fields: dict[str, Any], ranks: int) -> Any:
    (directory / "log").unlink(missing_ok=True)
    for left in directory.glob("pid-*"):
        left.unlink()
    process = fork.Process(target=launch, args=(directory, number, out, fields, ranks))
    process.start()
    return process


def _killed(
    directory: Path,
    number: int,
    out: str,
    fields: dict[str, Any],
    ranks: int,
    drawn: random.Random,
    seconds: float,
    *,
    in_writing: bool,
) -> dict[str, Any] | None:
    """Start ranks, kill one of them, and wait for the launcher: how it ended; None if the run was over before.

    :param seconds: that a whole run takes
    :param in_writing: kill while a checkpoint is written, and not the first one
    """
    training = directory / f"{out}-training"
    victim = drawn.randrange(ranks)
    step = step_to_kill_at(last_step(training) + (2 if in_writing else 0), drawn)
    process = _started(directory, number, out, fields, ranks)
    if in_writing:
        while process.is_alive() and not being_written(training, step):
            time.sleep(0.0005)
        time.sleep(drawn.uniform(0, 0.02))
    else:
        process.join(drawn.uniform(0.2, 1) * seconds)
    place = directory / f"pid-{victim}"
    while process.is_alive() and not place.exists():
        time.sleep(0.01)
    if not process.is_alive():
        wait_for(process, directory)
        return None
    os.kill(int(place.read_text()), signal.SIGKILL)
    found = moment(training)
    began = time.monotonic()
    process.join(PATIENCE)
    ended = not process.is_alive()
    if not ended:
        process.kill()
        process.join()
    for checkpoint in complete_checkpoints(training):
        read_verified(checkpoint)
    said = (directory / "log").read_text()
    return {
        "moment": found,
        "rank": victim,
        "seconds": round(time.monotonic() - began, 1),
        "ended": ended and process.exitcode != 0,
        "told": bool(re.search(r"Signal 9 \(SIGKILL\) received by PID", said)),
    }


def _compared(a: Path, b: Path) -> dict[str, Any]:
    """Relative difference of all weights together, and entries that are zero in one and not in the other."""
    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    ours, theirs = (torch.cat([of[name].flatten().double() for name in first]) for of in (first, second))
    return {
        "difference": float((ours - theirs).norm() / theirs.norm()),
        "bits": int(((ours == 0) != (theirs == 0)).sum()),
        "entries": ours.numel(),
    }
