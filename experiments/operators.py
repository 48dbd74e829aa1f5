"""Operators at their best setting and inside a search, on the zoos of real classifiers.

    python -m experiments.operators vision --root DATA
    python -m experiments.operators text --root DATA

The held-out examples of every set are two halves. On the first, an operator is settled: by a small
grid, over a coefficient common to all experts and then over its own setting; and by a run, which
searches a coefficient for each expert, with the setting, in as many evaluations as are given. What
was settled on is then reported on the second half, which no choice has seen. The measure is the one
that papers on merging print: each set's accuracy divided by that of its own expert, mean over sets.

Every evaluation is kept, example by example, in the work folder, so the command goes on where it
was interrupted. It writes ``operators.json`` into ``experiments/NAME`` and what stands between the
marks of its ``OPERATORS.md``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

import map_bo
from experiments.fronts import KeptRows
from experiments.record_numbers import FIRST, LAST, with_numbers
from map_bo.data import Metric, Observations
from map_bo.errors import ConfigError, DataError
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.problems.cache import cache_root
from map_bo.problems.zoo.datasheet import versions
from map_bo.problems.zoo.expert_training import TunedProblem
from map_bo.problems.zoo.images import HeadAccuracy, ImagesProblem, images_problem
from map_bo.problems.zoo.text import text_problem
from map_bo.scale import Scale
from map_bo.space import CoefficientSpace

__all__ = ["ENTRIES", "Entry", "Halves", "compare", "main"]

HERE = Path(__file__).parent
ZooProblem = TunedProblem | ImagesProblem
PROBLEMS: dict[str, Callable[..., ZooProblem]] = {"text": text_problem, "vision": images_problem}
SIZES = {"text": 150, "vision": 1900}

# Common coefficients of operators that add experts up, and of those that average them.
SUM = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
MEAN = (0.2, 0.35, 0.5, 0.75, 1.0, 1.5)


@dataclass(frozen=True)
class Entry:
    """An operator of the table.

    Attributes:
        label: How the table calls it.
        operator: The operator; what it searches is settled by the grid too.
        common: Coefficients of the grid, common to all experts.
        upper: Upper bound of every coefficient in the search.
        shares: Whether ``common`` is what the coefficients of all experts sum to.
        values: Values in the grid of the setting that is searched, if one is.
        ends: Pairs of first and last coefficients, for a profile in depth, in place of ``common``.
    """

    label: str
    operator: MergeOperator
    common: Sequence[float] = SUM
    upper: float = 1.0
    shares: bool = False
    values: Sequence[float] = ()
    ends: Sequence[tuple[float, float]] = ()

    def settle(
        self, space: CoefficientSpace, score: Callable[[Tensor], float]
    ) -> tuple[Tensor, int] | None:
        """Return the best row (``d``) of the grid and the number of rows tried; None without one.

        The coefficient is settled first, with the setting as it is by default, and then the setting
        with that coefficient.

        Args:
            space: The coefficients, and the setting as their last column.
            score: Value of a row, of which more is better.
        """
        experts = len(space.experts)
        scale = experts if self.shares else 1
        scales = [list(pair) for pair in self.ends] or [[one / scale] for one in self.common]
        default = list(space.defaults) if self.values else []
        rows = [torch.tensor(one * experts + default, dtype=torch.float64) for one in scales]
        if not rows:
            return None
        best = max(rows, key=score)
        others = []
        for value in self.values:
            others.append(best.clone())
            others[-1][-1] = value
        tried = rows + [x for x in others if not torch.equal(x, best)]
        return max(tried, key=score), len(tried)


def _choice() -> map_bo.OperatorChoice:
    return map_bo.OperatorChoice(
        {
            "task_arithmetic": map_bo.TaskArithmetic(),
            "ties": map_bo.Ties(search=["density"]),
            "tsv_m": map_bo.TSVM(),
            "iso_c": map_bo.IsoC(),
        }
    )


_DENSITIES = (0.1, 0.2, 0.5)

ENTRIES: dict[str, Entry] = {
    "task_arithmetic": Entry("task arithmetic", map_bo.TaskArithmetic()),
    "ties": Entry(
        "TIES",
        map_bo.Ties(search=["density"]),
        MEAN,
        1.5,
        values=_DENSITIES,
    ),
    "dare": Entry(
        "DARE",
        map_bo.Dare(search=["drop_rate"]),
        values=(0.5, 0.7, 0.9),
    ),
    "tsv_m": Entry("TSV-M", map_bo.TSVM(), MEAN, 1.5),
    "iso_c": Entry("Iso-C", map_bo.IsoC(), MEAN, 1.5),
    "iso_cts": Entry("Iso-CTS", map_bo.IsoCTS(), MEAN, 1.5),
    "regmean_data_free": Entry(
        "RegMean without data",
        map_bo.DataFreeRegMean(search={"ridge": (0.01, 2.0)}),
        MEAN,
        shares=True,
        values=(0.1, 0.3, 1.0),
    ),
    "pcb": Entry(
        "PCB",
        map_bo.Pcb(search=["density"]),
        MEAN,
        1.5,
        values=(0.05, 0.1, 0.2),
    ),
    "breadcrumbs": Entry(
        "Breadcrumbs",
        map_bo.Breadcrumbs(search=["density"]),
        values=(0.143, 0.3, 0.6),
    ),
    "model_stock": Entry("Model Stock", map_bo.ModelStock(), MEAN, shares=True),
    "depth_profile": Entry(
        "depth profile",
        map_bo.DepthProfile(),
        ends=[(first, last) for first in (0.1, 0.2, 0.4) for last in (0.2, 0.4, 0.6)],
    ),
    "knots": Entry(
        "KnOTS",
        map_bo.KnOTS(search=["density"]),
        MEAN,
        1.5,
        values=_DENSITIES,
    ),
    "sce": Entry(
        "SCE",
        map_bo.Sce(search=["density"]),
        MEAN,
        1.5,
        values=(0.1, 0.5, 1.0),
    ),
    "karcher": Entry("Karcher mean", map_bo.Slerp(of="weights"), MEAN, shares=True),
    "multislerp": Entry("multi-SLERP", map_bo.MultiSlerp(), MEAN, shares=True),
    "choice": Entry("choice among four", _choice(), (), 1.5),
    "weighted_average": Entry("weighted average", map_bo.WeightedAverage(), (1.0,)),
    "slerp": Entry("SLERP", map_bo.Slerp(), MEAN, shares=True),
    "nuslerp": Entry("NuSLERP", map_bo.NuSlerp(), MEAN, shares=True),
    "magnitude": Entry(
        "magnitude",
        map_bo.Magnitude(search=["density"]),
        values=_DENSITIES,
    ),
    "dare_ties": Entry(
        "DARE with TIES",
        map_bo.Dare(joining="elect", search=["drop_rate"]),
        MEAN,
        1.5,
        values=(0.5, 0.7, 0.9),
    ),
    "della": Entry(
        "DELLA",
        map_bo.Della(search=["drop_rate"]),
        MEAN,
        1.5,
        values=(0.3, 0.5, 0.7),
    ),
    "consensus": Entry(
        "consensus",
        map_bo.Consensus(search=["strictness"]),
        values=(0.2, 0.4, 0.6),
    ),
    "nearswap": Entry(
        "nearswap",
        map_bo.NearSwap(search=["strength"]),
        values=(0.5, 1.0, 2.0),
    ),
    "ram": Entry("RAM", map_bo.Ram(), MEAN, 1.5),
}


class Halves:
    """A zoo's problem measured on the first half of its examples; the second is kept beside it.

    Args:
        problem: The problem, whose metrics are accuracies.
        folder: Where the evaluations are kept; the name of the file holds a digest of the
            problem's description.

    Attributes:
        problem: The problem.
        space: Its coefficients.
        metrics: Its metrics, on the first half of the examples.
    """

    def __init__(self, problem: ZooProblem, folder: Path) -> None:
        self.problem = problem
        self.space: CoefficientSpace = problem.space
        self.metrics: tuple[Metric, ...] = problem.metrics
        self._rows = KeptRows(problem, folder, "outcomes")

    def outcomes(self, x: Tensor) -> Tensor:
        """Return which examples the merge with ``x`` (``d``) gets right: ``m x n`` of 0 and 1."""
        return torch.tensor(
            [[float(mark) for mark in marks] for marks in self._row(x.tolist())["right"]],
            dtype=torch.float64,
        )

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        """Return the accuracies of ``X`` (``n x d``) on the first half of the examples."""
        rows = [self._row(x) for x in X.tolist()]
        right = torch.stack([first_half(self.outcomes(x)) for x in X])
        Y, n = right.mean(-1), right.shape[-1]
        return Observations(
            X,
            Y,
            self.metrics,
            Yvar=Y * (1 - Y) / n,
            counts=torch.full_like(Y, n),
            cost=torch.tensor([row["cost"] for row in rows], dtype=torch.float64),
        )

    def describe(self) -> Mapping[str, Any]:
        """Return what the problem says of itself, and that half of the examples are used."""
        return {**self.problem.describe(), "half": "first"}

    def _row(self, x: list[float]) -> dict[str, Any]:
        return self._rows.at(x, partial(self._measure, x))

    def _measure(self, x: list[float]) -> dict[str, Any]:
        start = time.perf_counter()
        with self.problem.load(torch.tensor(x, dtype=torch.float64)) as model:
            right = [
                is_right(self.problem, metric.name, model, self.problem.size)
                for metric in self.metrics
            ]
        marks = ["".join(str(int(one)) for one in found.tolist()) for found in right]
        return {"right": marks, "cost": time.perf_counter() - start}


def is_right(problem: ZooProblem, name: str, model: nn.Module, size: int) -> Tensor:
    """Return which of ``size`` examples of a set a model gets right, as 0 and 1."""
    measure = problem.evaluator(name)
    if isinstance(measure, ExampleEvaluator):
        return measure.score(model, torch.arange(size))
    if not isinstance(measure, HeadAccuracy):
        raise ConfigError(
            f"{name} is measured by {type(measure).__name__}, which does not score by example",
            hint="compare operators on a zoo of classifiers",
        )
    with torch.inference_mode():
        logits = measure.head(model(measure.inputs))
    right: Tensor = (logits.argmax(-1) == measure.labels).double().clone()
    return right


def first_half(outcomes: Tensor) -> Tensor:
    """Return every other example, ``m x ceil(n / 2)``, from the first on: what choices see."""
    return outcomes[..., ::2]


def second_half(outcomes: Tensor) -> Tensor:
    """Return the other examples, ``m x floor(n / 2)``: what is reported."""
    return outcomes[..., 1::2]


def normalised(right: Tensor, own: Tensor) -> float:
    """Return the mean over sets of accuracy divided by that of the set's own expert.

    Args:
        right: ``m x n`` outcomes.
        own: ``m x n`` outcomes of each set's own expert on the same examples.
    """
    return float((right.mean(-1) / own.mean(-1)).mean())


def gap(right: Tensor, other: Tensor, own: Tensor) -> tuple[float, float]:
    """Return how much more one merge has than another, and the standard error of that.

    Both were measured on the same examples, so the error is that of paired differences. The
    experts' own accuracies are taken as known.

    Args:
        right: ``m x n`` outcomes.
        other: ``m x n`` outcomes of the other merge on the same examples.
        own: ``m x n`` outcomes of each set's own expert.
    """
    differences = (right - other) / own.mean(-1, keepdim=True)
    m, n = differences.shape
    return float(differences.mean()), float((differences.var(-1) / n).sum().sqrt() / m)


def weights_for(scale: Scale, own: Tensor) -> dict[str, float]:
    """Return the preference that compares merges by their mean normalised accuracy.

    Preferences weigh gains on a scale; here each accuracy counts by one over that of its expert.

    Args:
        scale: The scale of a run on ``m`` accuracies.
        own: ``m`` accuracies of the sets' own experts.
    """
    widths = torch.where(scale.ranged, scale.best - scale.point, 1.0)
    names = [metric.name for metric in scale.metrics]
    return dict(zip(names, (widths / own).tolist(), strict=True))


def compare(
    make: Callable[..., ZooProblem],
    work: Path,
    *,
    entries: Mapping[str, Entry],
    budget: int,
    seed: int = 0,
    say: Callable[[str], None] = print,
    after: Callable[[dict[str, Any]], None] = lambda numbers: None,
    **settings: Any,
) -> dict[str, Any]:
    """Return the numbers of the comparison as plain data.

    Args:
        make: Called with ``operator`` and ``upper``; returns the problem.
        work: Folder of what is kept: evaluations and runs.
        entries: Name -> operator; the first must be task arithmetic.
        budget: Evaluations of each search.
        seed: Seed of the searches.
        say: Is told how far it is.
        after: Is given the numbers so far after each operator.
        settings: Of the searches; see `map_bo.optimize`.
    """
    plain = Halves(make(operator=map_bo.TaskArithmetic(), upper=1.0), work)
    anchors = plain.space.anchors()
    seen = {name: plain.outcomes(x) for name, x in zip(anchors.names, anchors.X, strict=True)}
    sets = [metric.name for metric in plain.metrics]
    own = torch.stack([seen[name][i] for i, name in enumerate(sets)])
    known, told = first_half(own), second_half(own)
    for i, name in enumerate(sets):
        if not (bool(known[i].any()) and bool(told[i].any())):
            raise DataError(
                f"the expert {name} gets no example of its own set right in one of the halves",
                hint="use more examples, or an expert that is trained longer",
            )
    settled = ENTRIES["task_arithmetic"].settle(plain.space, partial(_settled, plain, known))
    assert settled is not None  # it has a grid
    yardstick = second_half(plain.outcomes(settled[0]))

    def report(right: Tensor) -> dict[str, Any]:
        difference, error = gap(second_half(right), yardstick, told)
        return {
            "settled": normalised(first_half(right), known),
            "reported": normalised(second_half(right), told),
            "difference": difference,
            "error": error,
            "accuracies": second_half(right).mean(-1).tolist(),
        }

    best = max(sets, key=lambda name: normalised(first_half(seen[name]), known))
    numbers: dict[str, Any] = {
        "sets": sets,
        "size": plain.problem.size,
        "halves": [known.shape[-1], told.shape[-1]],
        "budget": budget,
        "seed": seed,
        "own": {"settled": known.mean(-1).tolist(), "reported": told.mean(-1).tolist()},
        "without": {
            "individual experts": report(own),
            "base": report(seen["base"]),
            f"one expert for all ({best})": report(seen[best]),
            "uniform blend": report(seen["uniform blend"]),
        },
        "operators": {},
        "versions": versions(),
        "problem": plain.problem.zoo.describe(),
    }
    for name, entry in entries.items():  # the grids of all come first, because they cost least
        halves = Halves(make(operator=entry.operator, upper=entry.upper), work)
        found: dict[str, Any] = {"label": entry.label}
        settled = entry.settle(halves.space, partial(_settled, halves, known))
        if settled is not None:
            x, found["evaluations"] = settled
            found["grid"] = {"x": _named(halves.space, x), **report(halves.outcomes(x))}
            say(f"{entry.label}: grid {found['grid']['reported']:.3f}")
        numbers["operators"][name] = found
        after(numbers)
    for name, entry in entries.items():
        halves = Halves(make(operator=entry.operator, upper=entry.upper), work)
        result = map_bo.optimize(
            halves,
            budget,
            seed=seed,
            run_dir=work / f"run-{name}-{budget}-{seed}",
            progress=False,
            tracking="none",
            **settings,
        )
        x = result.choose(weights_for(result.scale, known.mean(-1))).x
        found = numbers["operators"][name]
        found["search"] = {"x": _named(halves.space, x), **report(halves.outcomes(x))}
        say(f"{entry.label}: search {found['search']['reported']:.3f}")
        after(numbers)
    return numbers


def _settled(halves: Halves, known: Tensor, x: Tensor) -> float:
    """Return the normalised accuracy of the merge with ``x`` (``d``) on the first half."""
    return normalised(first_half(halves.outcomes(x)), known)


def _named(space: CoefficientSpace, x: Tensor) -> dict[str, float | str]:
    values = dict(zip(space.names, x.tolist(), strict=True))
    return dict(values) if space.choice is None else space.choice.named(values)


def words(numbers: Mapping[str, Any], command: str) -> str:
    """Return the numbers in Markdown."""
    first, second = numbers["halves"]
    found = numbers["versions"]
    sets = numbers["sets"]
    lines = [
        f"`{command}`",
        "",
        f"Sets: {', '.join(sets)}. Each is settled on {first} held-out examples and reported on "
        f"{second} others; a search has {numbers['budget']} evaluations (seed {numbers['seed']}). "
        f"map-bo {found['map-bo']}, torch {found['torch']}.",
        "",
        "Normalised accuracy in percent of the individual experts on the second half; in brackets "
        "the difference from task arithmetic at its best common coefficient, with its standard "
        "error from paired examples.",
        "",
        "| operator | grid | best of the grid | inside the search | settled at |",
        "| :-- | --: | --: | --: | :-- |",
    ]
    for name, row in numbers["without"].items():
        lines.append(f"| {name} |  | {_cell(row)} |  |  |")
    for row in numbers["operators"].values():
        ways = [row[way] for way in ("grid", "search") if way in row]
        cells = [_cell(row[way]) if way in row else "" for way in ("grid", "search")]
        at = _settings(ways[0]["x"], sets) if ways else ""
        lines.append(
            f"| {row['label']} | {row.get('evaluations', '')} | {' | '.join(cells)} | {at} |"
        )
    both = [row for row in numbers["operators"].values() if "grid" in row and "search" in row]
    better = sum(row["search"]["reported"] > row["grid"]["reported"] for row in both)
    waiting = [row["label"] for row in numbers["operators"].values() if "search" not in row]
    verdict = (
        f"The search's choice has more than the best of the grid in {better} of {len(both)} "
        "operators."
    )
    lines += [
        *(["", verdict] if both else []),
        *(["", f"Not searched yet: {', '.join(waiting)}."] if waiting else []),
        "",
        "Accuracies on the second half:",
        "",
        "| | " + " | ".join(sets) + " |",
        "| :-- |" + " --: |" * len(sets),
    ]
    rows = {**numbers["without"]}
    for row in numbers["operators"].values():
        rows |= {f"{row['label']}, {way}": row[way] for way in ("grid", "search") if way in row}
    for name, row in rows.items():
        values = " | ".join(f"{value:.3f}" for value in row["accuracies"])
        lines.append(f"| {name} | {values} |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any]) -> str:
    if not row["error"]:
        return f"{100 * row['reported']:.1f}"
    return (
        f"{100 * row['reported']:.1f} ({100 * row['difference']:+.1f} ± {100 * row['error']:.1f})"
    )


def _settings(x: Mapping[str, float | str], sets: Sequence[str]) -> str:
    """Return coefficients in words; a value that all experts have is said once."""
    parts: dict[str, dict[str, float | str]] = {}
    others: dict[str, float | str] = {}
    for name, value in x.items():
        expert, _, end = name.partition("/")
        if expert in sets:
            parts.setdefault(end, {})[expert] = value
        else:
            others[name] = value
    found = []
    for end, values in parts.items():
        one = len(set(values.values())) == 1
        named = {"each": next(iter(values.values()))} if one else values
        found += [f"{name} {end}".strip() + f" {_number(value)}" for name, value in named.items()]
    return ", ".join(found + [f"{name} {_number(value)}" for name, value in others.items()])


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2g}"


def main(argv: Sequence[str] | None = None) -> None:
    """Compare on one zoo, and write the numbers of its study."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=sorted(PROBLEMS))
    parser.add_argument("--root", type=Path, help="folder of the data sets (MAP_BO_DATA)")
    parser.add_argument("--budget", type=int, default=16, help="evaluations of each search")
    parser.add_argument("--size", type=int, help="held-out examples per set, both halves")
    parser.add_argument("--only", nargs="+", choices=list(ENTRIES), default=list(ENTRIES))
    parser.add_argument("--out", type=Path, help="folder of the study; experiments/NAME")
    parser.add_argument("--work", type=Path, help="what is kept; in the cache by default")
    options = parser.parse_args(argv)
    size = SIZES[options.name] if options.size is None else options.size
    make = partial(PROBLEMS[options.name], options.root, progress=True, size=size)
    work = options.work or cache_root() / "operators" / f"{options.name}-{size}"
    out = options.out or HERE / options.name
    out.mkdir(parents=True, exist_ok=True)
    command = f"python -m experiments.operators {options.name} --budget {options.budget}"
    command += f" --size {size}"
    if options.only != list(ENTRIES):
        command += f" --only {' '.join(options.only)}"

    def write(numbers: dict[str, Any]) -> None:
        (out / "operators.json").write_text(json.dumps(numbers, indent=1) + "\n")
        page = out / "OPERATORS.md"
        before = page.read_text() if page.exists() else f"# Operators\n\n{FIRST}\n{LAST}\n"
        page.write_text(with_numbers(before, words(numbers, command)))

    compare(
        make,
        work,
        entries={name: ENTRIES[name] for name in options.only},
        budget=options.budget,
        say=partial(print, flush=True),
        after=write,
    )


if __name__ == "__main__":
    main()
