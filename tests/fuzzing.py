"""What fuzzers share: hostile JSON and files, and limits on what a case may take."""

import copy
import faulthandler
import json
import os
import resource
import signal
import socket
from contextlib import contextmanager

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# A run by hand sets this to 10,000, and draws anew every time.
CASES = int(os.environ.get("ELSA_FUZZ_CASES", "0"))
SECONDS = 30
# Bytes that a case may take; and at which it is stopped, so that the machine is not.
MEMORY = 400 * 10**6
_STOPPED_AT = 4 * 10**9

ODD_NAMES = ["[/red]x", "[bold]", "a\nb\x1b[31m", "\u202ex", "\ud800", "\0", "", "..", "../x", "/x", "x" * 5000]
# Not what json.dumps writes: put into the text in place of a string.
_RAW = {
    "@nan": "NaN",
    "@infinity": "-Infinity",
    "@digits": "9" * 5000,
    "@exponent": "1e400",
    "@deep": "[" * 3000 + "]" * 3000,
    "@deeper": '{"a":' * 100_000 + "1" + "}" * 100_000,
}
VALUES = [
    *(None, True, -1, 0, 1, 7, 1.0, 1.5, -0.0, 1e308, 2**31, 2**40, 2**63 - 1, 2**63, 2**64, 10**25),
    *([], [[]], [None], {}, {"a": {}}, [2**62, 4], [0, 2**62, 2**62], [1] * 17, ["plane0", "plane0"], "x"),
    *ODD_NAMES,
    *_RAW,
]


def cases(share):
    """Settings of a fuzzer: so much of all cases, or of 400 that are the same every time."""
    return settings(
        max_examples=max(1, round((CASES or 400) * share)),
        deadline=None,
        database=None,
        derandomize=not CASES,
        suppress_health_check=list(HealthCheck),
    )


def peak_memory(*, reset=False):
    """The most bytes that this process has held, since it started or since the last reset."""
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))


class Hang(BaseException):
    """A case that took too long; no Exception, so that nothing that handles those takes it for its own."""


@contextmanager
def limits():
    """No more than so many seconds, and bytes beyond what the process has."""

    def late(*_):
        raise Hang(f"more than {SECONDS} seconds")

    previous = signal.signal(signal.SIGALRM, late)
    with open("/proc/self/statm") as statm:
        virtual = int(statm.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    signal.alarm(SECONDS)
    # For code that does not come back to Python.
    faulthandler.dump_traceback_later(6 * SECONDS, exit=True)
    resource.setrlimit(resource.RLIMIT_AS, (virtual + _STOPPED_AT, hard))
    before = peak_memory(reset=True)
    try:
        yield
        grown = peak_memory() - before
        assert grown <= MEMORY, f"{grown:,} bytes of memory"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


class _Twice(dict):
    """An object that is written with its keys named twice."""

    def items(self):
        return [*super().items(), *super().items()]


def as_bytes(document):
    """A JSON document, hostile or not, as the bytes of its file."""
    text = json.dumps(document)
    for name, raw in _RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text.encode()


@st.composite
def mutated(draw, document, values=VALUES):
    """A copy of a JSON document with one node of it changed, put in or taken out."""
    document = copy.deepcopy(document)
    parent, key = {"": document}, ""
    node = document
    while isinstance(node, (dict, list)) and node and draw(st.integers(0, 9)):
        parent, key = node, draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
        node = parent[key]
    action = draw(st.sampled_from(["replace", "replace", "replace", "near", "delete", "insert", "twice", "rename"]))
    if action == "delete" and parent is not document and key == "":
        action = "replace"
    if action == "near" and type(node) in (int, float):
        parent[key] = draw(st.sampled_from([node + 1, node - 1, float(node), -node, node * 2**20, str(node)]))
    elif action == "delete" and key != "":
        del parent[key]
    elif action == "insert" and isinstance(node, dict):
        node[draw(st.sampled_from(ODD_NAMES))] = draw(st.sampled_from(values))
    elif action == "insert" and isinstance(node, list):
        node.append(draw(st.sampled_from(values)))
    elif action == "twice" and isinstance(node, dict):
        parent[key] = _Twice(node)
    elif action == "rename" and isinstance(parent, dict) and key != "":
        parent[draw(st.sampled_from(ODD_NAMES))] = parent.pop(key)
    else:
        parent[key] = draw(st.sampled_from(values))
    return document if key != "" else parent[""]


def _socket(path):
    # The name of a socket may have 100 characters.
    here = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{here}/{path.name}")
    finally:
        os.close(here)


KINDS = {
    "pipe": os.mkfifo,
    "zeros": lambda path: path.symlink_to("/dev/zero"),
    "null": lambda path: path.symlink_to("/dev/null"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "socket": _socket,
    "directory": lambda path: path.mkdir(),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to the directory": lambda path: path.symlink_to("."),
    "missing": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "no text": lambda path: path.write_bytes(b"\xff\xfe{\x00}\x00"),
    "long header": lambda path: path.write_bytes(b"\xff" * 7 + b"\x7f{}"),
}


def become(path, kind):
    """Put something else in a file's place."""
    path.unlink(missing_ok=True)
    KINDS[kind](path)
