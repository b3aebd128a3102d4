"""Numbers and paths as a report says them."""

import shlex
from pathlib import Path

__all__ = ["bytes_in_words", "counted", "duration", "number", "often", "percent", "shell"]


def number(value: float) -> str:
    """Three digits or more, without powers of ten."""
    return f"{value:,.2f}" if value < 100 else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def percent(fraction: float) -> str:
    """A fraction, with as many digits as tell 99.95% from all."""
    return f"{fraction:.2%}" if fraction > 0.985 else f"{fraction:.1%}"


def bytes_in_words(count: int) -> str:
    """A size in MB or GB: 10^6 or 10^9 bytes."""
    return f"{count / 1e9:,.2f} GB" if count >= 10**9 else f"{count / 1e6:,.1f} MB"


def counted(count: str, what: str) -> str:
    """How many there are of something."""
    return f"{count} {what}" + ("" if count == "1" else "s")


def often(times: float) -> str:
    """How often something was done."""
    said = f"{times:.3g}"
    return "once" if said == "1" else f"{said} times"


def duration(seconds: float) -> str:
    """A time, in the two largest units that it has."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def shell(text: str | Path) -> str:
    """As a word of a command line."""
    return shlex.quote(str(text))
