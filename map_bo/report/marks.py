"""How each kind of point looks in every plot: distinct in colour and in shape.

Colours are those of Okabe and Ito, "Color Universal Design" (2008), which stay distinct in all
common forms of colour blindness.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from map_bo.data import Metric
from map_bo.report.numbers import better, shorten
from map_bo.report.view import RunView, anchor_values, search_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

__all__ = [
    "GREY",
    "INK",
    "KINDS",
    "Mark",
    "axis_label",
    "default_style",
    "legend_handles",
    "literal",
    "points_by_kind",
    "style_axes",
    "title_of",
]

INK = "#262626"
GREY = "#8c8c8c"
_LINES = "#e4e4e4"


@contextmanager
def default_style() -> Iterator[None]:
    """Draw with matplotlib's own defaults: a ``matplotlibrc`` of a run's folder is of others."""
    import matplotlib

    own = {k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith("backend")}
    with warnings.catch_warnings(), matplotlib.rc_context():
        # Characters that the font lacks are drawn as boxes; the tables hold them in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        matplotlib.rcParams.update(own)
        yield


@dataclass(frozen=True)
class Mark:
    """The look of one kind of point.

    Attributes:
        label: Its name in the legend.
        colour: Its colour.
        shape: Its matplotlib marker; diamonds are drawn open, so that points under them show.
        size: Area of the marker in points squared.
        order: Drawing order, the highest on top.
    """

    label: str
    colour: str
    shape: str
    size: float
    order: int

    def scatter(self, axes: Axes, x: Any, y: Any, *, size: float = 1.0) -> None:
        """Draw points in this look; ``size`` scales the marker."""
        inside, edge, width = self._paint()
        axes.scatter(
            x,
            y,
            marker=self.shape,
            s=self.size * size,
            facecolors=inside,
            edgecolors=None if self.shape in ("x", "+") else edge,
            linewidths=width,
            alpha=0.75 if self.size <= 20 else 1.0,
            zorder=self.order,
        )

    def _paint(self) -> tuple[str, str, float]:
        if self.shape in ("x", "+"):
            return self.colour, self.colour, 1.2
        if self.shape == "D":
            return "none", self.colour, 1.9
        return self.colour, "white", 0.7 if self.size > 20 else 0.0

    def handle(self, label: str | None = None) -> Line2D:
        """Return its entry for a legend, under its own label or another."""
        from matplotlib.lines import Line2D

        inside, edge, width = self._paint()
        return Line2D(
            [],
            [],
            linestyle="none",
            marker=self.shape,
            color=self.colour,
            markersize=max(5.0, self.size**0.5),
            markerfacecolor=inside,
            markeredgecolor=edge,
            markeredgewidth=width,
            label=self.label if label is None else label,
        )


KINDS: Mapping[str, Mark] = {
    "observed": Mark("observed", GREY, "x", 26, 3),
    "predicted": Mark("front, predicted", "#0072B2", "o", 15, 4),
    "real": Mark("front, real (verified)", "#D55E00", "D", 46, 8),
    "expert": Mark("expert", "#009E73", "s", 62, 6),
    "base": Mark("base", "#000000", "^", 72, 6),
    "blend": Mark("uniform blend", "#CC79A7", "*", 170, 7),
    "reference": Mark("reference point", INK, "+", 90, 5),
}


def points_by_kind(view: RunView) -> dict[str, Tensor]:
    """Return the points (``n x m``, own units) of each kind that the run has."""
    front = view.front
    points = {
        "observed": view.seen.Y[search_rows(view)],
        "predicted": front.mean,
        "real": front.real[front.verified],
    }
    for kind in ("expert", "base", "blend"):
        values = [anchor.y for anchor in anchor_values(view) if anchor.kind == kind]
        points[kind] = torch.stack(values) if values else front.mean[:0]
    points["reference"] = view.scale.point[None]
    return {kind: values for kind, values in points.items() if len(values)}


def legend_handles(
    view: RunView, *, without: tuple[str, ...] = (), beyond: int = 0
) -> list[Line2D]:
    """Return one legend entry for each kind of point that the run has.

    Args:
        view: The run.
        without: Kinds to leave out.
        beyond: How many observed points lie outside the axes; the legend says so.
    """
    reach = "reaches" if beyond == 1 else "reach"
    notes = {"observed": f"observed ({beyond} {reach} beyond the axes)" if beyond else None}
    kinds = [kind for kind in points_by_kind(view) if kind not in without]
    return [KINDS[kind].handle(notes.get(kind)) for kind in kinds]


def title_of(view: RunView, what: str) -> str:
    """Return the title of a plot: what it shows, and of which run."""
    return f"{what}: {literal(shorten(view.title, 40))}"


def literal(text: str) -> str:
    """Return ``text`` escaped so that matplotlib draws it as it is, without mathematics."""
    return text.replace("$", r"\$")


def axis_label(metric: Metric, *, length: int = 34, lines: int = 1) -> str:
    """Return a metric's name with its direction."""
    gap = " " if lines == 1 else "\n"
    return f"{literal(shorten(metric.name, length))}{gap}({better(metric)})"


def style_axes(axes: Axes) -> None:
    """Give axes the look of all plots: a light grid, two spines, quiet ticks."""
    axes.set_axisbelow(True)
    axes.grid(True, color=_LINES, linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=9, length=3, color=GREY)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
