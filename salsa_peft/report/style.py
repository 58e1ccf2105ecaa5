"""Appearance of the report's figures: palette, font sizes, and drawing with matplotlib as inline SVG.

A model has the same colour, dash and marker in every figure (Okabe and Ito's palette, safe for colour-blind readers).
Uses matplotlib's object interface, not pyplot's global state.
"""

import io
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK, MUTED, GRID, PAPER = "#1c2128", "#59636f", "#d5dae1", "#fffffe"
WIDTH = 5.0
"""Width of a panel in inches: 360 points, so that text of 9.5 points keeps its size on a phone."""
LEAST = (2.4, 0.4)
"""Minimum width and height of the axes in inches, without their labels."""
MARGIN = 0.1
"""Minimum width beside a legend in inches, both sides together."""
MOST, LONG = 8, 24
"""Maximum number of names, and of characters of a name, of a legend inside the axes."""
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
    """Colours, dash and marker of one model."""

    color: str
    dark: str
    """The colour on a dark page."""
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
    """Name → look: fixed for the names in KNOWN, for others by order of appearance; controls are hollow."""
    unknown = [name for name in dict.fromkeys(names) if name not in KNOWN]
    found = {name: KNOWN[name] for name in names if name in KNOWN}
    found |= {name: SPARE[index % len(SPARE)] for index, name in enumerate(unknown)}
    return {name: replace(look, control=look.control or name in controls) for name, look in found.items()}


@dataclass(frozen=True)
class Panel:
    """One figure as inline SVG and as PNG."""

    name: str
    """The PNG's file name, without its suffix."""
    alt: str
    svg: str
    png: bytes


def legend(axes: Axes, **options: Any) -> None:
    """Draw the legend inside the axes, or below them if its names are too many or too long to leave room for the data."""
    names = axes.get_legend_handles_labels()[1]
    long = max(map(len, names), default=0) > LONG
    if len(names) > MOST or long:
        axes.figure.legend(loc="outside lower center", **{**options, "ncols": 1 if long else 2})
    else:
        axes.legend(loc="best", **options)


def panel(name: str, alt: str, draw: Callable[[Axes], None], height: float, width: float = WIDTH) -> Panel:
    """Draw one figure of width × height inches, and larger where labels and legends would leave too little for the axes."""
    svg, png = io.StringIO(), io.BytesIO()
    with matplotlib.rc_context({**RC, "svg.hashsalt": name}):
        layout = ConstrainedLayoutEngine()
        figure = Figure(figsize=(width, height), dpi=150, layout=layout)
        canvas = FigureCanvasAgg(figure)
        draw(axes := figure.add_subplot())
        figure.set_size_inches(_size(figure, axes, canvas.get_renderer()))
        layout.execute(figure)  # laid out once; savefig would lay out and draw four times
        figure.set_layout_engine("none")
        canvas.print_png(png, metadata={"Software": None})
        figure.patch.set_facecolor("none")
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Panel(name, alt, _inline(svg.getvalue()), png.getvalue())


def _size(figure: Figure, axes: Axes, renderer: RendererAgg) -> tuple[float, float]:
    """Width and height in inches: the legends below the axes are added, and the axes keep at least LEAST beside their labels."""
    inner, outer = axes.get_window_extent(renderer), axes.get_tightbbox(renderer, for_layout_only=True)
    labels = np.zeros(2) if outer is None else np.subtract(outer.size, inner.size)
    below = [one.get_window_extent(renderer).size for one in figure.legends]
    width, height = np.maximum(figure.get_size_inches(), labels / figure.dpi + LEAST)
    widest, total = max((size[0] for size in below), default=0.0), sum(size[1] for size in below)
    return max(float(width), widest / figure.dpi + MARGIN), float(height) + total / figure.dpi


def _inline(svg: str) -> str:
    """Turn matplotlib's SVG into an element of the page, with colours as CSS variables."""
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :]).replace("xlink:href", "href")
    tag, _, content = svg.partition(">")
    svg = re.sub(r' (?:width|height)="[^"]*pt"', "", tag) + ">" + content
    used = set(re.findall(r"(?:url\(|href=\")#([\w.-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "sans-serif", re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL))
    for light, variable in variables().items():
        svg = svg.replace(light, f"var({variable})")
    return svg


def variables() -> dict[str, str]:
    """Colour in a figure → the CSS variable that replaces the colour, so that a dark page can change it."""
    palette = {look.color: f"--series-{index}" for index, look in enumerate((*KNOWN.values(), *SPARE))}
    return {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"} | palette


def darks() -> dict[str, str]:
    """CSS variable of a model's colour → its value on a dark page."""
    return {f"--series-{index}": look.dark for index, look in enumerate((*KNOWN.values(), *SPARE))}
