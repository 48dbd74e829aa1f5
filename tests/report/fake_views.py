"""Runs that look like real ones, made without running anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from map_bo.data import Front, Metric, Observations, directions, to_maximisation
from map_bo.report.view import RunView, anchor_values
from map_bo.rng import child, make_generator
from map_bo.scale import Scale
from map_bo.space import CoefficientSpace

TASKS = ("rot90", "invert", "flip", "permute", "blur", "shear", "crop", "noise")


def metrics_of(m: int, loss: Sequence[int]) -> tuple[Metric, ...]:
    return tuple(
        Metric(f"{TASKS[i]} loss", "min", "loss") if i in loss else Metric(TASKS[i])
        for i in range(m)
    )


def true_values(X: Tensor, metrics: Sequence[Metric]) -> Tensor:
    """Every metric is best near its own expert and suffers from the others."""
    d = X.shape[-1]
    columns = []
    for i, metric in enumerate(metrics):
        target = torch.full((d,), 0.08, dtype=torch.float64)
        target[i % d] = 0.9
        gap = ((X - target).square() * torch.linspace(1.0, 1.6, d)).sum(-1)
        share = torch.sigmoid(2.6 - 3.2 * gap)
        columns.append(share if metric.direction == "max" else -share.log() + 0.02)
    return torch.stack(columns, -1)


def within(Y: Tensor, metrics: Sequence[Metric]) -> Tensor:
    low = [-torch.inf if metric.lower is None else metric.lower for metric in metrics]
    high = [torch.inf if metric.upper is None else metric.upper for metric in metrics]
    return Y.clamp(torch.tensor(low, dtype=Y.dtype), torch.tensor(high, dtype=Y.dtype))


def make_view(
    m: int = 2,
    d: int | None = None,
    *,
    loss: Sequence[int] = (),
    evaluations: int = 20,
    points: int = 120,
    verify: int = 3,
    failures: Sequence[int] = (),
    seed: int = 0,
    metrics: tuple[Metric, ...] | None = None,
    title: str = "digits_four",
    notes: Sequence[str] = ("the front is kept where the evaluations support the surrogate",),
    certain: bool = False,
) -> RunView:
    """Return a run with ``m`` metrics and ``d`` experts (``max(m, 2)`` by default).

    With ``certain`` it says how sure its front is, and that a stopping rule ended the search.
    """
    generator = make_generator(seed)
    metrics = metrics or metrics_of(m, loss)
    d = d or max(m, 2)
    space = CoefficientSpace.box(TASKS[:d])
    anchors = space.anchors()
    U = space.sample(evaluations, generator=child(generator, "design"))
    X = torch.cat([anchors.X, U])[:evaluations]
    noise = torch.randn(
        evaluations + verify, m, generator=child(generator, "noise"), dtype=torch.float64
    )
    Y = within(true_values(X, metrics) + 0.01 * noise[:evaluations], metrics)
    Y[list(failures)] = torch.nan
    seen = Observations(
        X=X,
        Y=Y,
        metrics=metrics,
        Yvar=torch.full_like(Y, 1e-4),
        counts=torch.full_like(Y, 300.0),
        cost=torch.linspace(0.4, 0.9, evaluations),
        failures=tuple(
            "RuntimeError: CUDA out of memory" if i in failures else None
            for i in range(evaluations)
        ),
    )
    pool = torch.rand(4000, d, generator=child(generator, "pool"), dtype=torch.float64)
    weights = torch.rand(400, m, generator=child(generator, "w"), dtype=torch.float64) + 0.02
    gains = to_maximisation(true_values(pool, metrics), metrics)
    best = {int(((gains - 1.0) / w).amin(-1).argmax()) for w in weights}
    rows = torch.tensor(sorted(best)[:points])
    truth = true_values(pool[rows], metrics)
    mean = truth + 0.012 * directions(metrics)
    std = torch.full_like(mean, 0.015)
    front = Front(pool[rows], mean, std, mean - 2 * std, mean + 2 * std, metrics)
    verify = min(verify, len(front))
    spread = torch.linspace(0, len(front) - 1, verify).long().tolist()
    real = within(truth[spread] + 0.01 * noise[evaluations : evaluations + verify], metrics)
    front = front.with_real(spread, real)
    if certain:
        front = dataclasses.replace(
            front,
            corrected=front.corrected if verify == 0 else front.mean - 0.01 * directions(metrics),
            probability=torch.linspace(0.001, 0.999, len(front)),
        )
    seen = seen.append(
        Observations(X=front.X[spread], Y=real, metrics=metrics, cost=torch.full((verify,), 0.7))
    )
    ends = to_maximisation(true_values(anchors.X[:-1], metrics), metrics).amin(0)
    experts = to_maximisation(seen.Y[1 : d + 1][seen.ok[1 : d + 1]], metrics)
    highest = torch.cat([experts, ends[None]]).amax(0)
    scale = Scale(
        metrics,
        to_maximisation(ends, metrics),
        to_maximisation(highest, metrics),
        "worst of base and experts",
    )
    view = RunView(
        title=title,
        space=space,
        front=front,
        seen=seen,
        scale=scale,
        summary={},
    )
    summary = summary_of(view, verify, notes, seed)
    if certain:
        summary |= certainty_of(view, verify)
    return dataclasses.replace(view, summary=summary)


def summary_of(view: RunView, verify: int, notes: Sequence[str], seed: int) -> dict[str, Any]:
    from map_bo.pareto.indicators import hypervolume

    def volume(values: Tensor) -> float | None:
        if not len(values):
            return None
        zero = torch.zeros(len(view.metrics), dtype=torch.float64)
        return hypervolume(view.scale.gains(values), zero)

    names = [metric.name for metric in view.metrics]
    values = anchor_values(view)
    blend = [volume(a.y[None]) for a in values if a.kind == "blend"]
    experts = [volume(a.y[None]) or 0.0 for a in values if a.kind == "expert"]
    gap = ((view.front.mean - view.front.real) * directions(view.metrics))[view.front.verified]
    optimism = gap.mean(0).tolist() if verify else [None] * len(names)
    return {
        "evaluations": len(view.seen),
        "budget": len(view.seen),
        "verification": {"points": verify, "counted": "inside the budget"},
        "failures": sum(reason is not None for reason in view.seen.failures),
        "seed": seed,
        "front_points": len(view.front),
        "hypervolume": {
            "predicted front": volume(view.front.mean),
            "verified points": volume(view.front.real[view.front.verified]),
            "observed points": volume(view.seen.succeeded().Y),
            "uniform blend": blend[0] if blend else None,
            "best expert": max(experts) if experts else None,
        },
        "reference_point": dict(zip(names, view.scale.point.tolist(), strict=True)),
        "reference_rule": view.scale.rule,
        "optimism": dict(zip(names, optimism, strict=True)),
        "surrogate": {
            "settings": "Auto(candidates=('quadratic', 'gp', 'hybrid'))",
            "model": "AutoModel",
            "selection": [
                {"metric": name, "chosen": "gp" if i == 1 else "quadratic"}
                for i, name in enumerate(names)
            ],
        },
        "sampler": "Adaptive(initial=None)",
        "seconds": {"propose": 1.9312, "evaluate": 12.4021, "fit": 0.0713, "solve": 0.3127},
        "notes": list(notes),
        "versions": {"python": "3.11.9", "map-bo": "0.1.0", "torch": "2.13.0"},
        "commit": "0123456789abcdef0123456789abcdef01234567",
    }


def certainty_of(view: RunView, verify: int) -> dict[str, Any]:
    names = [metric.name for metric in view.metrics]
    return {
        "uncertainty": {
            "hypervolume": {
                "median": 0.8123,
                "lower": 0.7712,
                "upper": 0.8534,
                "predicted": 0.82,
                "draws": 128,
                "points": len(view.front),
                "kind": "exact",
            },
            "optimism": {
                "left_out": {name: {"mean": 0.0131, "se": 0.0042} for name in names},
                "simulated": {name: {"mean": 0.001, "sd": 0.01} for name in names},
                "measured": {
                    name: {"mean": 0.012 if verify else None, "se": 0.003 if verify > 1 else None}
                    for name in names
                },
                "corrected": dict.fromkeys(names, 0.01 if verify else None),
            },
        },
        "stop": {
            "criterion": "regret",
            "tolerance": 0.005,
            "patience": 2,
            "least": None,
            "reason": (
                "expected regret still to be gained at most 0.005 for 2 rounds (0.004, 0.003)"
            ),
            "series": [[10, 0.02], [11, 0.004], [12, 0.003]],
            "least_gain": 0.003,
            "floor": 0.001,
            "unused": 5,
        },
    }
