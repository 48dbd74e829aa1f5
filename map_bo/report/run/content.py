"""What the card and the page say about a run, as rows of text; they only lay it out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from map_bo.constraints import plain_constraints
from map_bo.report.numbers import better, difference, metric_value, seconds
from map_bo.report.run.certainty import stop_words
from map_bo.report.view import RunView

__all__ = ["facts", "failure_rows", "hypervolume_rows", "hypervolume_scale", "metric_rows", "notes"]

_VOLUMES = {
    "predicted front": "predicted",
    "verified points": "real",
    "observed points": "real",
    "uniform blend": "real",
    "best expert": "real",
}


def facts(view: RunView) -> list[tuple[str, str]]:
    """Return the facts of a run as label and text; those the summary does not hold are left out."""
    summary, front = view.summary, view.front
    evaluations = str(summary.get("evaluations", len(view.seen)))
    full = summary.get("full_evaluations")
    if full is not None:
        evaluations += f", at the cost of {_count(float(full))} full ones"
    if "budget" in summary:
        evaluations += f" (budget {summary['budget']})"
    checked = summary.get("verification") or {}
    if checked.get("points"):
        where = f", {checked['counted']}" if checked.get("counted") else ""
        evaluations += f"; {checked['points']} of them measured front points{where}"
    failed = summary.get("failures", sum(reason is not None for reason in view.seen.failures))
    partly_failed = view.seen.partial & view.seen.failed_rows
    partial = summary.get("partial", int(partly_failed.sum()))
    partly = f" ({partial} of them in some metrics only)" if partial else ""
    real = int(front.verified.sum())
    points = "1 predicted point" if len(front) == 1 else f"{len(front)} predicted points"
    rows = []
    nested = summary.get("nested")
    if isinstance(nested, Mapping):
        rows.append(
            (
                "nested",
                f"{len(nested['nodes'])} merges in {nested['stages']} stages; "
                f"{nested['data_sets']} measurements of one task at one point, as many as "
                f"{float(nested['flat_evaluations']):.1f} evaluations of all tasks",
            )
        )
    kept = summary.get("cache")
    if isinstance(kept, Mapping) and kept:
        evaluations += (
            f"; {kept['evaluations']} of them and {kept['metrics']} measurements in all came from "
            f"the cache, which saved {seconds(float(kept['seconds_saved']))}"
        )
    rows += [
        ("of all tasks" if nested else "evaluations", evaluations),
        *([("examples", _examples(summary["examples"]))] if summary.get("examples") else []),
        ("failed", (f"{failed}{partly}" if failed else "none")),
        ("front", f"{points}, {real or 'none'} of them also measured"),
    ]
    if view.space.placed_choice is not None:
        counts = view.space.placed_choice.counts(front.X)
        used = ", ".join(f"{option} at {count}" for option, count in counts.items())
        rows.append((view.space.placed_choice.axis.name, f"{used} of its points"))
    if stop_words(view):
        rows.append(("stopped", stop_words(view)))
    surrogate = summary.get("surrogate")
    if isinstance(surrogate, Mapping) and surrogate:
        rows.append(("surrogate", _surrogate(surrogate)))
    if "sampler" in summary:
        own = summary.get("sampler_surrogate")
        through = f", through a surrogate of its own: {_name(own)}" if own else ""
        rows.append(("sampler", f"{_name(summary['sampler'])}{through}"))
    if "seed" in summary:
        rows.append(("seed", str(summary["seed"])))
    spent = summary.get("seconds")
    if isinstance(spent, Mapping) and spent:
        parts = (f"{name} {seconds(float(value))}" for name, value in spent.items())
        rows.append(("time", ", ".join(parts)))
    workers = summary.get("workers")
    if isinstance(workers, Mapping) and "utilisation" in workers:
        count, kind = workers.get("count", "?"), workers.get("kind", "")
        which = f"{count} {'process' if (count, kind) == (1, 'processes') else kind}".strip()
        rows.append(("workers", f"{which}, busy {float(workers['utilisation']):.0%} of the time"))
    return rows


def _examples(spent: Mapping[str, Mapping[str, Any]]) -> str:
    """Return how many examples of each task were scored, and on how many a usual merge was."""
    said = []
    for name, one in spent.items():
        usual, full, held = float(one["median"]), int(one["full"]), int(one["held_out"])
        if full + held == 1:
            said.append(f"{name} {one['scored']} times as a whole")
            continue
        kept = f", {held:,} held out" if held else ""
        said.append(f"{name} {one['scored']:,} (median {usual:g} of {full:,} per merge{kept})")
    return "; ".join(said)


def _count(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _surrogate(about: Mapping[str, Any]) -> str:
    """Return the surrogate's name and, where each metric has its own, which one."""
    name = _name(about.get("settings") or about.get("model") or "unknown")
    chosen: dict[str, list[str]] = {}
    selection = about.get("selection")
    for entry in selection if isinstance(selection, list | tuple) else ():
        if isinstance(entry, Mapping) and "chosen" in entry:
            chosen.setdefault(str(entry["chosen"]), []).append(str(entry.get("metric", "?")))
    said = "; ".join(f"{kind} for {', '.join(metrics)}" for kind, metrics in chosen.items())
    return f"{name}: {said}" if said else name


def _name(settings: Any) -> str:
    """Return the text before the parentheses; the page holds the settings in full."""
    return str(settings).split("(", 1)[0]


def metric_rows(view: RunView) -> list[tuple[str, str, str, str, str]]:
    """Return for each metric: name, direction or bounds, reference point, best expert, optimism.

    A constrained metric has its bounds where others have the direction.
    Optimism is the mean of predicted minus real over the verified points; it is positive when the
    prediction was too good, whatever the direction, and empty where nothing was verified.
    """
    optimism = view.summary.get("optimism") or {}
    low, high = view.scale.point, view.scale.best
    bounds = plain_constraints(view.scale.constraints)
    rows = []
    for metric, a, b in zip(view.metrics, low.tolist(), high.tolist(), strict=True):
        gap = optimism.get(metric.name)
        rows.append(
            (
                metric.name,
                " and ".join(bounds.get(metric.name) or [better(metric)]),
                metric_value(a, metric),
                metric_value(b, metric),
                "" if gap is None else difference(gap),
            )
        )
    return rows


def hypervolume_scale(view: RunView) -> str:
    """Return the sentence on the reference point and the scale of the hypervolumes."""
    said = (
        f"Reference point: {view.scale.rule}. Metrics are scaled to 0 there and to 1 at the "
        "best expert."
    )
    names = ", ".join(view.scale.rangeless)
    said = f"{said} Without a range, and not counted: {names}." if names else said
    kept = ", ".join(plain_constraints(view.scale.constraints))
    return f"{said} Constraints, and not counted: {kept}." if kept else said


def hypervolume_rows(view: RunView) -> list[tuple[str, str, float | None]]:
    """Return the hypervolumes: of what, ``"predicted"`` or ``"real"``, and the value."""
    recorded = view.summary.get("hypervolume") or {}
    return [
        (name, _VOLUMES.get(name, ""), None if value is None else float(value))
        for name, value in recorded.items()
    ]


def failure_rows(view: RunView) -> list[tuple[int, str]]:
    """Return the number (from 1) and the reason of every evaluation that failed."""
    return [
        (number, reason)
        for number, reason in enumerate(view.seen.failures, start=1)
        if reason is not None
    ]


def notes(view: RunView) -> list[str]:
    """Return the notes of the run."""
    return [str(note) for note in view.summary.get("notes") or ()]
