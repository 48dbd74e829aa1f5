"""The plots of a run as PNG files, drawn without a display and without global state."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

from map_bo.report.files import write_whole
from map_bo.report.numbers import better
from map_bo.report.view import RunView, anchor_values, search_rows

__all__ = ["describe_plot", "write_plots"]


def write_plots(view: RunView, directory: Path) -> list[Path]:
    """Draw the front and the progress of a run, and its tree, into ``directory``.

    Returns:
        The files.

    Raises:
        OSError: When a file cannot be written.
    """
    from map_bo.report.front_plots import front_figure
    from map_bo.report.progress_plot import progress_figure
    from map_bo.report.tree_plot import nested_of, tree_figure

    figures = [("front", front_figure), ("progress", progress_figure)]
    if nested_of(view) is not None:
        figures.append(("tree", tree_figure))
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in figures:
        image = io.BytesIO()
        with warnings.catch_warnings():
            # Names in scripts that the font lacks show as boxes; the tables hold them in full.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            draw(view).savefig(image, format="png")
        written.append(directory / f"{name}.png")
        write_whole(written[-1], image.getvalue())
    return written


def describe_plot(view: RunView, name: str) -> str:
    """Return in words what the plot called ``name`` (a file's stem) shows, for those who listen."""
    if name == "progress":
        return (
            f"Hypervolume of the observed points after each of {len(view.seen)} evaluations, "
            "with the predicted front, the verified points, the best expert and the uniform "
            "blend as horizontal lines. The hypervolume table holds the final values."
        )
    if name == "tree":
        from map_bo.report.tree_plot import tree_words

        return tree_words(view)
    if name != "front":
        return name
    front, m = view.front, len(view.metrics)
    axes = ", ".join(f"{metric.name} ({better(metric)})" for metric in view.metrics)
    kind = {1: "Plot of one metric", 2: "Scatter plot of two metrics"}.get(
        m,
        f"Scatter plots of all pairs of {m} metrics" if m <= 5 else f"{m} parallel axes",
    )
    anchors = ", ".join(anchor.name for anchor in anchor_values(view)) or "none"
    return (
        f"{kind}: {axes}. It shows {len(front)} predicted points of the front, "
        f"{int(front.verified.sum())} of them also as measured, "
        f"{int(search_rows(view).sum())} further observed points and these anchors: {anchors}. "
        "The tables hold the values."
    )
