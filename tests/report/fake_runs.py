"""Many runs that look like those of a sweep, made without running anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from map_bo.data import Metric
from map_bo.report.comparison.comparison import Comparison, compare
from map_bo.report.comparison.runs import Outcome, RunRecord
from tests.report.fake_views import make_view

SURROGATES = {"gp": 20, "quadratic": 14}


def record(
    settings: Mapping[str, str],
    *,
    m: int = 2,
    evaluations: int = 20,
    verify: int = 3,
    failures: Sequence[int] = (),
    sweep: str = "sweep",
    name: str | None = None,
    metrics: tuple[Metric, ...] | None = None,
    loss: Sequence[int] = (),
) -> RunRecord:
    view = make_view(
        m,
        evaluations=evaluations,
        points=30,
        verify=verify,
        failures=failures,
        seed=int(settings.get("seed", 0)),
        metrics=metrics,
        loss=loss,
    )
    name = name or ",".join(f"{key}={value}" for key, value in sorted(settings.items()))
    return RunRecord(
        name,
        f"{name}/report.html",
        sweep,
        "finished",
        settings=settings,
        named=tuple(settings),
        outcome=Outcome(view.seen, view.front, view.scale, view.summary["seconds"]),
    )


def failed(name: str = "surrogate=gp,seed=9", reason: str = "out of memory") -> RunRecord:
    return RunRecord(name, f"{name}/", "sweep", "failed", reason)


def sweep(m: int = 2, seeds: int = 5, *, loss: Sequence[int] = ()) -> list[RunRecord]:
    """Two surrogates; the second has fewer evaluations, so it has found no more."""
    return [
        record({"surrogate": name, "seed": str(seed)}, m=m, evaluations=n, loss=loss)
        for name, n in SURROGATES.items()
        for seed in range(seeds)
    ]


def comparison(
    m: int = 2, seeds: int = 5, *, more: Sequence[RunRecord] = (), loss: Sequence[int] = ()
) -> Comparison:
    return compare([*sweep(m, seeds, loss=loss), *more], title="study")
