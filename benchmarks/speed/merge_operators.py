"""Operators that are not linear: preparing them, and candidates with old and new settings.

The yardstick is the same copy as for a linear merge: it moves what every merge must move, the base
and all task vectors once in and the merged weights once out.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.merge_models import coefficients, resident
from benchmarks.speed.merge_part import (
    ABSENT,
    Copy,
    Options,
    Outcome,
    Way,
    in_turns,
    medians,
    over,
    row,
    table_of,
    timed,
)
from benchmarks.speed.merge_peers import (
    MERGEKIT,
    installed,
    mergekit_merge,
    require_equal,
    states_of,
)
from map_bo.merging.vectors.operator import PreparedMerge
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.operators.averages import Slerp
from map_bo.operators.consensus import Consensus
from map_bo.operators.nearswap import NearSwap
from map_bo.operators.pcb import Pcb
from map_bo.operators.sce import Sce
from map_bo.operators.searchable import SearchableOperator
from map_bo.operators.shared_regions import Ram
from map_bo.operators.sparse import Breadcrumbs, Dare, Della, Magnitude, Ties
from map_bo.operators.spectral.isotropic import IsoC, IsoCTS
from map_bo.operators.spectral.knots import KnOTS
from map_bo.operators.spectral.tsv import TSVM
from map_bo.operators.spherical import MultiSlerp, NuSlerp
from map_bo.operators.statistics.data_free import DataFreeRegMean
from map_bo.operators.stock import ModelStock

__all__ = ["CASES", "Case", "measure"]

EXPERTS = (3, 8)
GOAL_SECONDS, GOAL_PARAMETERS = 1.0, 134e6
_SLOW = 3.0


@dataclass(frozen=True)
class Case:
    """An operator.

    Attributes:
        label: How the table calls it.
        operator: The operator, with its settings fixed.
        searched: Name of the setting that changes between candidates, where one is searched.
        peer: mergekit's method of that kind.
        parameters: Its parameters.
        same: Whether it merges to the same model.
        elementwise: Whether a candidate is made number by number, which the goal is for; others
            multiply and decompose matrices.
    """

    label: str
    operator: SearchableOperator
    searched: str | None = None
    peer: str | None = None
    parameters: dict[str, float] = field(default_factory=dict)
    same: bool = False
    elementwise: bool = True


CASES = (
    Case("Ties", Ties(), "density"),
    Case(
        "Ties, mergekit's settings",
        Ties(trim="tensor", election="weighted_mass", normalisation="weights"),
        "density",
        "ties",
        {"density": Ties.density},
        same=True,
    ),
    Case(
        "Dare, elected signs",
        Dare(joining="elect"),
        "drop_rate",
        "dare_ties",
        {"density": 1 - Dare.drop_rate},
    ),
    Case("Dare, sum", Dare(), "drop_rate", "dare_linear", {"density": 1 - Dare.drop_rate}),
    Case(
        "Della",
        Della(),
        "drop_rate",
        "della",
        {"density": 1 - Della.drop_rate, "epsilon": Della.epsilon / 2},
    ),
    Case(
        "Breadcrumbs",
        Breadcrumbs(),
        "density",
        "breadcrumbs",
        {"density": Breadcrumbs.density, "gamma": Breadcrumbs.gamma},
    ),
    Case("Consensus", Consensus(), "strictness"),
    Case("Slerp", Slerp()),
    Case("Magnitude", Magnitude(), "density"),
    Case("TSV-M", TSVM()),
    Case("Iso-C", IsoC(), elementwise=False),
    Case("Iso-CTS", IsoCTS()),
    # A basis of two large embeddings is not what it is made for.
    Case(
        "KnOTS, without embeddings",
        KnOTS(skip="embed|lm_head"),
        "density",
        elementwise=False,
    ),
    Case("RegMean without data", DataFreeRegMean(), "ridge", elementwise=False),
    Case("MultiSlerp", MultiSlerp()),
    Case("NuSlerp, rows", NuSlerp()),
    Case("ModelStock", ModelStock()),
    Case("NearSwap", NearSwap(), "strength"),
    Case("Pcb", Pcb(), "density"),
    Case("Sce", Sce(), "density"),
    Case("Ram", Ram(), "rescale"),
)


def measure(options: Options) -> Outcome:
    """Measure all operators with few and with many experts."""
    shape = options.size.resident
    every = resident(shape, max(EXPERTS), torch.float32)
    out = torch.empty(every.layout.size)
    few = min(EXPERTS)
    goal = f"< {GOAL_SECONDS * shape.parameters / GOAL_PARAMETERS:.2g} s"
    lines, rows = [], []
    for experts in EXPERTS:
        vectors = TaskVectors(every.experts[:experts], every.layout, every.rows[: 1 + experts])
        copy = Copy(vectors.rows, (experts + 2) * out.numel() * out.element_size())
        for case in CASES:
            found = rows_of(case, vectors, out, copy, options.size.repeats)
            rows.append({"operator": case.label, "experts": experts, **found})
            if options.peers and experts == few and case.peer is not None:
                rows[-1]["mergekit"] = _peer_seconds(case, vectors, out)
            asked = experts == few and case.elementwise
            lines.append(_line(rows[-1], goal if asked else None))
            gc.collect()
    million = shape.parameters / 1e6
    note = (
        f"Task vectors of {million:.3g} M parameters in float32 on {torch.get_num_threads()} "
        f"threads; medians of {options.size.repeats} turns, mergekit.merge_state_dicts once. A "
        'searched setting changes with every candidate; "over copy" is that of the candidate '
        "with fixed settings, then with a searched one."
    )
    heads = (
        "operator",
        "experts",
        "prepare s",
        "candidate s",
        "over copy",
        "searched",
        "prepare s",
        "candidate s",
        "over copy",
        "goal",
        "mergekit s",
    )
    data = {
        "parameters": shape.parameters,
        "repeats": options.size.repeats,
        "mergekit": installed(MERGEKIT),
        "rows": rows,
    }
    title = f"Operators on {million:.3g} M parameters"
    return Outcome(title, table_of(note, heads, lines), data)


def rows_of(
    case: Case, vectors: TaskVectors, out: Tensor, copy: Copy, repeats: int
) -> dict[str, Any]:
    """Prepare an operator and let its candidates and the copy take turns."""
    experts = len(vectors.experts)
    fixed, preparing = _prepared(lambda: case.operator.prepare(vectors))
    ways: dict[str, Way] = {
        "copy": timed(copy),
        "fixed": timed(lambda turn: fixed.write(coefficients(experts, turn), out)),
    }
    found: dict[str, Any] = {"prepare": preparing, "setting": case.searched}
    if case.searched is not None:
        searching = replace(case.operator, search=[case.searched])
        value = float(getattr(case.operator, case.searched))
        searched, found["prepare searched"] = _prepared(lambda: searching.prepare(vectors))

        def changed(turn: int) -> None:
            # A new value in every turn, down to four fifths of the usual one.
            setting = value * (1 - 0.2 * (turn + 1) / (repeats + 1))
            c = torch.cat([coefficients(experts, turn), torch.tensor([setting]).double()])
            searched.write(c, out)

        ways["searched"] = timed(changed)
    seconds = in_turns(ways, repeats)
    found |= {
        "seconds": medians(seconds),
        "over copy": over(seconds),
        "all seconds": seconds,
    }
    return found


def _prepared(prepare: Callable[[], PreparedMerge]) -> tuple[PreparedMerge, float]:
    """Return a prepared merge and the median time of three; of one where that is slow."""
    times: list[float] = []
    while len(times) < 3 and (not times or times[-1] < _SLOW):
        prepared = None  # two at a time would take twice the memory
        start = time.perf_counter()
        prepared = prepare()
        times.append(time.perf_counter() - start)
    assert prepared is not None
    return prepared, median(times)


def _peer_seconds(case: Case, vectors: TaskVectors, out: Tensor) -> float | None:
    if installed(MERGEKIT) is None:
        return None
    c = coefficients(len(vectors.experts))
    merge = mergekit_merge(states_of(vectors), case.peer or "", case.parameters)
    start = time.perf_counter()
    merged = merge(c)
    took = time.perf_counter() - start
    if case.same:
        case.operator.prepare(vectors).write(c, out)
        # mergekit takes deltas of rounded experts: a few in a million cross the threshold.
        require_equal(f"mergekit's {case.peer}", vectors, out, merged, tolerance=1e-3)
    return took


def _line(found: dict[str, Any], goal: str | None) -> str:
    seconds, ratios = found["seconds"], found["over copy"]
    searched = ratios.get("searched")
    peer: object = found.get("mergekit")
    if "mergekit" in found and peer is None:
        peer = ABSENT
    return row(
        found["operator"],
        found["experts"],
        found["prepare"],
        seconds["fixed"],
        f"{ratios['fixed']:.2f}",
        found["setting"],
        found.get("prepare searched"),
        seconds.get("searched"),
        None if searched is None else f"{searched:.2f}",
        goal,
        peer,
    )
