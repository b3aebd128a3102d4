"""Answers of vLLM engines that need no server: seconds each, where a server takes half a minute."""

import json
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from benchmarks.vllm_server import PYTHON, SETTINGS, server_environment


class Answer(NamedTuple):
    """Log-probabilities of a prompt's tokens but the first, and what the engine printed until it had them."""

    logprobs: list[float]
    log: str


def answers(asked, prompt, place, *, taken_for=None, environment=None, **common):
    """One answer for each of ``asked``.

    :param asked: pairs of a directory and of the loader's extra configuration
    :param place: a directory that the process runs in
    :param taken_for: what the processor is taken for: ``"avx2"`` is one without AVX-512, ``"gpu"`` a GPU
    :param common: arguments of ``vllm.LLM`` for all of them, before those that every engine here gets
    """
    common = SETTINGS | common | {"prompt": prompt}
    jobs = [common | {"model": str(directory), "model_loader_extra_config": loader} for directory, loader in asked]
    # A file's path, and not a module: the package is to be the installed one.
    command = [str(PYTHON), str(Path(__file__).with_name("engine_process.py")), *([taken_for] if taken_for else [])]
    run = subprocess.run(
        command,
        input=json.dumps(jobs),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=place,
        env=server_environment(environment),
    )
    parts = re.split(r"^ANSWER (.*)$", run.stdout, flags=re.MULTILINE)
    assert run.returncode == 0 and len(parts) == 2 * len(jobs) + 1, run.stdout[-4000:]
    return [Answer(json.loads(logprobs), log) for log, logprobs in zip(parts[0:-1:2], parts[1::2], strict=True)]
