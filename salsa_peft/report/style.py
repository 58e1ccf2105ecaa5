"""How a panel of the report looks: one palette for all figures, one type size, and matplotlib's drawing as inline SVG.

A model has one colour, dash and marker everywhere (Okabe and Ito's palette, safe for colour-blind readers). The object
interface only: nothing here touches pyplot's state.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK, MUTED, GRID, PAPER = "#1c2128", "#59636f", "#d5dae1", "#fffffe"
WIDTH = 5.0
"""Inches; at 72 points each a panel is 360 wide, so type of 9.5 points is read at its size on a phone."""
RC: Any = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.9,
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.parse_math": False,
}
MEASURES = {"reward": "training reward", "gold": "gold reward"}


@dataclass(frozen=True)
class Look:
    """How one model is drawn, everywhere."""

    color: str
    dark: str
    """The same colour on a dark page."""
    dash: str
    marker: str
    control: bool = False


KNOWN = {
    "base": Look("#7a7a7a", "#a9b0b8", ":", "X", control=True),
    "seed-0": Look("#56b4e9", "#8fd0f5", "-.", "o"),
    "soup": Look("#009e73", "#2cc79b", "-", "*"),
    "ppo": Look("#0072b2", "#3d9be0", "--", "s"),
    "salsa": Look("#d55e00", "#ff8a3d", "-", "D"),
    "shrunk": Look("#cc79a7", "#e59cc5", "-.", "v", control=True),
    "mkl": Look("#e69f00", "#f5b942", ":", "^"),
}


SPARE = (
    Look("#6a51a3", "#a894e0", "--", "P"),
    Look("#8c510a", "#c98f4e", "-.", "<"),
    Look("#1b7837", "#7fbf7b", ":", ">"),
    Look("#a50f15", "#f08080", "-", "p"),
    Look("#35978f", "#80cdc1", "--", "h"),
)


def looks(names: Sequence[str], controls: Collection[str] = ()) -> dict[str, Look]:
    """A model's look depends on its name, for unknown names on the order in which they first come; controls are hollow."""
    unknown = [name for name in dict.fromkeys(names) if name not in KNOWN]
    found = {name: KNOWN[name] for name in names if name in KNOWN}
    found |= {name: SPARE[index % len(SPARE)] for index, name in enumerate(unknown)}
    return {name: replace(look, control=look.control or name in controls) for name, look in found.items()}


@dataclass(frozen=True)
class Panel:
    name: str
    """The PNG's file name, without its suffix."""
    alt: str
    svg: str
    png: bytes


def panel(name: str, alt: str, draw: Callable[[Axes], None], height: float) -> Panel:
    svg, png = io.StringIO(), io.BytesIO()
    with matplotlib.rc_context({**RC, "svg.hashsalt": name}):
        layout = ConstrainedLayoutEngine()
        figure = Figure(figsize=(WIDTH, height), dpi=150, layout=layout)
        canvas = FigureCanvasAgg(figure)
        draw(figure.add_subplot())
        layout.execute(figure)  # laid out once; savefig would lay out and draw four times
        figure.set_layout_engine("none")
        canvas.print_png(png, metadata={"Software": None})
        figure.patch.set_facecolor("none")
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Panel(name, alt, _inline(svg.getvalue()), png.getvalue())


def _inline(svg: str) -> str:
    """matplotlib's file → an element of our page: no namespaces or ids that nothing refers to, colours by the page's
    variables.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(
        r'(<svg)([^>]*?) (?:width|height)="[^"]*pt"',
        r"\1\2",
        re.sub(r'(<svg)([^>]*?) (?:width|height)="[^"]*pt"', r"\1\2", svg),
    )
    used = set(re.findall(r"(?:url\(|href=\")#([\w.-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "sans-serif", re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL))
    for light, variable in variables().items():
        svg = svg.replace(light, f"var({variable})")
    return svg


def variables() -> dict[str, str]:
    """Colour in the drawing → the page's variable that stands for it, so that a dark page turns the figures too."""
    palette = {look.color: f"--series-{index}" for index, look in enumerate((*KNOWN.values(), *SPARE))}
    return {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"} | palette


def darks() -> dict[str, str]:
    """The page's variable of a model's colour → that colour on a dark page."""
    return {f"--series-{index}": look.dark for index, look in enumerate((*KNOWN.values(), *SPARE))}
