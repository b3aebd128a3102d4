"""A figure as SVG for a page and as PNG for everything else, by matplotlib.

In the SVG, ink and series have the page's colours instead of fixed ones, so that a dark page needs no second figure.
Drawn as wide as a phone shows it: text is at least 12 px there, and larger where there is more room.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["INK", "LINES", "PAPER", "SERIES", "Canvas", "Drawing", "canvas"]

# Okabe and Ito's, those with a contrast of 3:1 and more to white first; told apart by dashes and markers as well.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
LINES = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"))
INK, PAPER, _GRID = "#1a1b1c", "#ffffff", "#d4d5d6"
_WIDTH = 350  # px; a phone's 390 less the margins of the page
_PX = 1 / 96  # inches
_STYLE = {
    "font.size": 9.75,  # points: 13 px
    "axes.titlesize": 9.75,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 9.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    # Names out of files are not formulas.
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Drawing:
    """A figure.

    :param name: of its file, and of what it shows
    :param title: of the figure in the page
    :param caption: what it shows, in words, for those who do not see it as well
    :param svg: an element, to be put into a page
    """

    name: str
    title: str
    caption: str
    svg: str
    png: bytes


class Canvas:
    """A figure that is being drawn.

    :ivar axes: matplotlib's
    """

    def __init__(self, axes: Any) -> None:
        self.axes = axes
        self.drawing: Drawing


@contextmanager
def canvas(name: str, title: str, caption: str, *, height: int = 230) -> Iterator[Canvas]:
    """Axes to draw on; afterwards the canvas has the drawing.

    :param height: px, at a width of 350
    :raises ImportError: without matplotlib; the message says how to install it
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'elsa-modifier[plot]'") from error
    # The same numbers give the same file.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH * _PX, height * _PX), layout="constrained")
        drawn = Canvas(figure.subplots())
        yield drawn
        # Laid out once, for both files.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", transparent=True)
        figure.savefig(png, format="png", dpi=2 / _PX, facecolor=PAPER, metadata={"Software": None})
    drawn.drawing = Drawing(name, title, caption, _for_a_page(svg.getvalue(), name), png.getvalue())


def _for_a_page(svg: str, name: str) -> str:
    """What goes between ``<svg`` and ``</svg>`` in a page that has other figures, and colours of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'((?:xlink:)?href=")#', rf"\1#{name}-", svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    # As wide as there is room.
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r'<svg \1role="img" aria-hidden="true"', svg, count=1)
    svg = svg.replace(INK, "currentColor").replace(PAPER, "var(--paper)").replace(_GRID, "var(--grid)")
    for number, color in enumerate(SERIES, 1):
        svg = svg.replace(color, f"var(--series-{number})")
    return svg
