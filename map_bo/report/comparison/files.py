"""The files of a comparison (page, Markdown, table, plots), each written whole or not at all."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from map_bo.report.comparison.comparison import Comparison
from map_bo.report.comparison.page import comparison_html, comparison_markdown
from map_bo.report.comparison.plots import cost_figure, front_overlay, progress_bands
from map_bo.report.comparison.runs import MEASURES
from map_bo.report.files import remove_stale, write_whole
from map_bo.report.marks import default_style

__all__ = ["results_csv", "write_comparison"]


def write_comparison(found: Comparison, directory: Path) -> None:
    """Write ``results.csv``, ``report.md``, ``report.html`` and ``comparison/*.png``.

    Raises:
        OSError: When a file cannot be written; the file is then as it was before.
    """
    directory.mkdir(parents=True, exist_ok=True)
    folder = directory / "comparison"
    folder.mkdir(exist_ok=True)
    remove_stale(directory, folder)
    write_whole(directory / "results.csv", results_csv(found))
    plots = {}
    for name, draw in (
        ("progress", progress_bands),
        ("fronts", front_overlay),
        ("cost", cost_figure),
    ):
        image = io.BytesIO()
        with default_style():
            draw(found).savefig(image, format="png")
        plots[name] = image.getvalue()
        write_whole(folder / f"{name}.png", plots[name])
    write_whole(directory / "report.md", comparison_markdown(found))
    write_whole(directory / "report.html", comparison_html(found, plots))


def results_csv(found: Comparison) -> str:
    """Return one row per run, unfinished ones included, with all digits.

    Columns: ``run``, ``sweep``, ``status``, ``reason``, ``variant``, ``seed``, each setting that
    varies, then each measure, predicted and real apart, and ``reference:NAME`` of each metric.
    What is unknown is empty.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    references = [repr(value) for value in found.scale.point.tolist()]
    keys = [key for key in found.keys if key != "sweep"]  # it has its column
    writer.writerow(
        [
            *("run", "sweep", "status", "reason", "variant", "seed"),
            *keys,
            *(measure.name for measure in MEASURES),
            *(f"reference:{metric.name}" for metric in found.metrics),
        ]
    )
    measured = {id(run.record): run for run in found.runs}
    every = [run.record for variant in found.variants for run in found.of(variant)]
    for record in [*every, *found.missing]:
        run = measured.get(id(record))
        values = {} if run is None else run.values
        writer.writerow(
            [
                record.name,
                record.sweep,
                record.status,
                record.reason,
                "" if run is None else run.variant,
                "" if record.seed is None else str(record.seed),
                *(record.settings.get(key, "") for key in keys),
                *(repr(values[m.name]) if m.name in values else "" for m in MEASURES),
                *(references if run is not None else [""] * len(references)),
            ]
        )
    return text.getvalue()
