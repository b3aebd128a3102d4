"""A vLLM server of its own environment, as a context manager."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["PYTHON", "SETTINGS", "Server", "serve", "server_environment"]

PYTHON = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
SETTINGS = {
    "dtype": "bfloat16",
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 1024,
    "enforce_eager": True,
}
"""Of every engine here, as arguments of ``vllm.LLM``."""
_START_SECONDS = 300


class Server:
    """A running server's OpenAI API.

    :param log: what it has printed
    :param group: its process group
    """

    def __init__(self, address: str, log: Path, group: int) -> None:
        self._address = address
        self._log = log
        self._group = group

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def resident(self, kind: str = "VmRSS") -> int:
        """Bytes of memory of its largest process, the one with the weights: now, or at most so far (``VmHWM``)."""
        sizes = []
        for status in Path("/proc").glob("[0-9]*/status"):
            with suppress(OSError):
                if os.getpgid(int(status.parent.name)) == self._group:
                    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
                    sizes.append(1024 * int(fields.get(kind, "0 kB").split()[0]))
        return max(sizes)

    def post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            self._address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.load(response)

    def is_up(self) -> bool:
        try:
            with urllib.request.urlopen(self._address + "/health", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False


@contextmanager
def serve(model: Path, log: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Serve a directory; the server is gone after the block.

    :param arguments: of vLLM, after the ones that every server here gets, which they may undo
    :param environment: variables, likewise
    :raises RuntimeError: if it does not come up, with the end of its log
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), *_flags(SETTINGS), *arguments]
    with log.open("w") as output:
        # From another directory, so that the package is the installed one and not the checkout.
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=server_environment(environment),
            cwd=log.parent,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", log, process.pid)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not server.is_up():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not come up\n{server.log[-4000:]}")
            time.sleep(0.5)
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            # Workers may outlive the process that started them.
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _flags(settings: Mapping[str, Any]) -> Iterator[str]:
    for name, value in settings.items():
        yield "--" + name.replace("_", "-")
        if value is not True:
            yield str(value)


def server_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that a server here gets, besides ``environment``."""
    # The Makefile has memory kept that is freed, which helps training. No user's server does, and here it is measured.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    if not (shutil.which("g++") or shutil.which("clang++")):
        # vLLM compiles as it runs, for log-probabilities even where it is told to be eager.
        inherited["TORCH_COMPILE_DISABLE"] = "1"
    return inherited | _ENVIRONMENT | dict(environment or {})
