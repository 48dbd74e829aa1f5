"""The front of a run against what one has without it, on the zoos of real models.

    python -m experiments.fronts text --root DATA --seeds 10 --budget 24
    python -m experiments.fronts lm --root DATA
    python -m experiments.fronts vision --root DATA

At the same number of evaluations: a run (base, experts and blend, search, verification), uniformly
random coefficients, and a grid over one coefficient common to all experts; and what takes no
search: the best expert and the uniform blend. Every evaluation is kept in the work folder, so the
command goes on where it was interrupted. It writes ``numbers.json`` and ``front.png`` into
``experiments/NAME`` and what stands between the marks of its ``README.md``.

Hypervolumes are those of all points that a method measured, each metric scaled to 0 at the worst
of base and experts and to 1 at the best expert.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

import map_bo
from experiments.record_numbers import FIRST, LAST, with_numbers
from map_bo.data import Metric, Observations, to_maximisation
from map_bo.loop.result import Result
from map_bo.pareto.indicators import hypervolume
from map_bo.problems.cache import cache_root
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.problems.zoo.datasheet import versions
from map_bo.problems.zoo.decoder import decoder_problem
from map_bo.problems.zoo.expert_training import TunedProblem
from map_bo.problems.zoo.image_training import encoder
from map_bo.problems.zoo.images import ImagesProblem, images_problem
from map_bo.problems.zoo.pretrained import load_pretrained
from map_bo.problems.zoo.text import text_problem
from map_bo.rng import child, make_generator
from map_bo.scale import widths
from map_bo.space import CoefficientSpace

__all__ = ["Kept", "KeptRows", "compare", "main"]

HERE = Path(__file__).parent
ZooProblem = TunedProblem | ImagesProblem
PROBLEMS: dict[str, Callable[..., ZooProblem]] = {
    "text": text_problem,
    "lm": decoder_problem,
    "vision": images_problem,
}


class KeptRows:
    """What was measured at points, one line of JSON each, in a file that is added to.

    Args:
        problem: What is measured; the name of the file holds a digest of its description.
        folder: Where the file is.
        name: The name of the file begins with it.
    """

    def __init__(self, problem: ZooProblem | MergedModelProblem, folder: Path, name: str) -> None:
        text = json.dumps(problem.describe(), sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"{name}-{digest}.jsonl"
        self._rows: dict[str, dict[str, Any]] = {}
        if self._file.exists():
            for line in self._file.read_text().splitlines():
                if line.endswith("}"):  # the last one may have been cut by a kill
                    row = json.loads(line)
                    self._rows[_key(row["X"])] = row

    def at(self, x: Sequence[float], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what is kept of ``x`` (``d``); what is not is measured and kept, under ``X``."""
        if _key(x) not in self._rows:
            row = {"X": list(x), **measure()}
            with self._file.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self._rows[_key(x)] = row
        return self._rows[_key(x)]


def _key(x: Sequence[float]) -> str:
    return " ".join(f"{value:.12f}" for value in x)


class Kept:
    """A problem whose evaluations are kept in a file and looked up there.

    Args:
        problem: The problem; its metrics must be the same whenever they are measured.
        folder: Where the file is; its name holds a digest of the problem's description.
    """

    def __init__(self, problem: MergedModelProblem, folder: Path) -> None:
        self.problem = problem
        self.space: CoefficientSpace = problem.space
        self.metrics: tuple[Metric, ...] = problem.metrics
        self._rows = KeptRows(problem, folder, "evaluations")

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        """Return the evaluations of ``X`` (``n x d``); those that are not kept are made."""
        rows = [self._rows.at(x, partial(self._measure, x, generator)) for x in X.tolist()]
        columns = {
            name: torch.tensor([row[name] for row in rows], dtype=torch.float64)
            for name in ("X", "Y", "Yvar", "counts", "cost")
        }
        failures = tuple(row["failure"] for row in rows)
        return Observations(metrics=self.metrics, failures=failures, **columns)  # type: ignore[arg-type]

    def describe(self) -> Mapping[str, Any]:
        """Return what the problem says of itself."""
        return self.problem.describe()

    def _measure(self, x: list[float], generator: Generator) -> dict[str, Any]:
        point = torch.tensor([x], dtype=torch.float64)
        seen = self.problem.evaluate(point, generator=generator)
        row = {name: getattr(seen, name)[0].tolist() for name in ("Y", "Yvar", "counts", "cost")}
        return {**row, "failure": seen.failures[0]}


def gains(seen: Observations, anchors: Observations) -> Tensor:
    """Return ``n x m`` values on the scale of the anchors (base, then the experts).

    A metric in which these do not differ has the gain 1: it changes no hypervolume.
    """
    known = to_maximisation(anchors.Y, seen.metrics)
    low, high = known.amin(0), known[1:].amax(0)
    values = (to_maximisation(seen.succeeded().Y, seen.metrics) - low) / widths(low, high)
    return torch.where(high > low, values, 1.0)


def volume(values: Tensor) -> float:
    """Return the hypervolume of ``n x m`` gains."""
    return hypervolume(values, torch.zeros(values.shape[1], dtype=torch.float64))


def compare(
    problem: ZooProblem,
    work: Path,
    *,
    seeds: Sequence[int],
    budget: int,
    export: bool = True,
    say: Callable[[str], None] = print,
    **settings: Any,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the numbers of the comparison as plain data, and the gains of each method's points.

    Args:
        problem: The problem.
        work: Folder of what is kept: evaluations and runs.
        seeds: Seeds of runs and of random coefficients.
        budget: Evaluations of each run, of the random coefficients and of the grid.
        export: Whether to export chosen points of the first run and score them again.
        say: Is told how far it is.
        settings: Of the runs; see `map_bo.optimize`.
    """
    kept = Kept(problem, work)
    seed = make_generator(0)
    points = problem.space.anchors()
    anchors = kept.evaluate(points.X, generator=seed)
    say(f"anchors: {len(points.X)} evaluations")
    experts = anchors.select([i for i, kind in enumerate(points.kinds) if kind != "blend"])
    scaled = gains(anchors, experts)
    ones = torch.ones(1, problem.space.d, dtype=torch.float64)
    grid_X = torch.linspace(1 / budget, 1, budget, dtype=torch.float64).unsqueeze(1) * ones
    found = {
        "experts": scaled[1 : len(experts)],
        "blend": scaled[len(experts) :],
        "grid": gains(kept.evaluate(grid_X, generator=seed), experts),
    }
    say(f"grid: {budget} evaluations")
    curves: dict[str, list[list[float]]] = {"run": [], "random": []}
    rest: list[float] = []
    exported: list[dict[str, Any]] = []
    for number in seeds:
        result = map_bo.optimize(
            kept,
            budget,
            seed=number,
            run_dir=work / f"run-{budget}-{number}",
            progress=False,
            tracking="none",
            **settings,
        )
        seen = result.seen.append(result.verification)
        seconds = result.summary["seconds"]
        rest.append(sum(v for k, v in seconds.items() if k not in ("evaluate", "total")) / budget)
        X = problem.space.sample(budget, generator=child(make_generator(number), "random"))
        drawn = gains(kept.evaluate(X, generator=seed), experts)
        for name, values in (("run", gains(seen, experts)), ("random", drawn)):
            found[f"{name} {number}"] = values
            curves[name].append([volume(values[: i + 1]) for i in range(len(values))])
        say(
            f"seed {number}: run {curves['run'][-1][-1]:.3f}, random {curves['random'][-1][-1]:.3f}"
        )
        if export and number == seeds[0]:
            exported = score_exports(problem, result, work / "exports")
    everything = torch.cat(list(found.values()))
    numbers = {
        "budget": budget,
        "seeds": list(seeds),
        "metrics": [metric.name for metric in problem.metrics],
        "anchors": dict(zip(points.names, anchors.Y.tolist(), strict=True)),
        "hypervolume": {
            "best expert": max(volume(row.unsqueeze(0)) for row in found["experts"]),
            "uniform blend": volume(found["blend"]),
            "grid": volume(found["grid"]),
            "random": [curve[-1] for curve in curves["random"]],
            "run": [curve[-1] for curve in curves["run"]],
            "all points": volume(everything),
        },
        "curves": curves,
        "seconds": {
            **split_time(problem, points.X[-1]),
            "rest per evaluation": statistics.median(rest),
        },
        "exports": exported,
        "versions": versions(),
        "problem": {"size": problem.size, **problem.zoo.describe()},
    }
    return numbers, found


def split_time(problem: ZooProblem, x: Tensor, repeats: int = 3) -> dict[str, float]:
    """Return the seconds of one evaluation, by the clock and of the processor, and their parts.

    ``framework`` is an evaluation by evaluators that score nothing, of which ``merging`` is a part:
    what is left of it keeps evaluators from disturbing each other. These are processor seconds, as
    ``processor`` is of the whole evaluation, so that what else runs on the machine counts less.
    """
    bare = _without_scoring(problem)
    for one in (problem, bare):
        one.prepare()
    wall, whole, framework, merging = [], [], [], []
    for repeat in range(repeats):
        wall.append(time.perf_counter())
        whole.append(_processor_seconds(problem, x, repeat))
        wall[-1] = time.perf_counter() - wall[-1]
        framework.append(_processor_seconds(bare, x, repeat))
        start = time.process_time()
        with bare.load(x):
            merging.append((time.process_time() - start) * len(problem.metrics))
    parts = {"evaluation": wall, "processor": whole, "framework": framework, "merging": merging}
    return {name: statistics.median(times) for name, times in parts.items()}


def _processor_seconds(problem: MergedModelProblem, x: Tensor, seed: int) -> float:
    start = time.process_time()
    problem.evaluate(x.unsqueeze(0), generator=make_generator(seed))
    return time.process_time() - start


def _without_scoring(problem: ZooProblem) -> MergedModelProblem:
    """Return the same merging with evaluators that score nothing."""
    evaluators = {metric.name: _score_nothing for metric in problem.metrics}
    if isinstance(problem, TunedProblem):
        return MergedModelProblem(
            partial(load_pretrained, problem.base, problem.zoo.kind),
            base=problem.base,
            experts=problem.folders,
            evaluators=evaluators,
        )
    return MergedModelProblem(
        encoder(generator=make_generator(0)),
        base=problem.files["base"],
        experts={name: problem.files[name] for name in problem.zoo.names},
        evaluators=evaluators,
    )


def _score_nothing(model: nn.Module) -> float:
    return 0.5


def score_exports(problem: ZooProblem, result: Result, folder: Path) -> list[dict[str, Any]]:
    """Export three choices, load them as others would, and score them beside the live model."""
    names = [metric.name for metric in problem.metrics]
    rows: list[dict[str, Any]] = []
    for prefer in (dict.fromkeys(names, 1.0), {names[0]: 1.0}, {names[-1]: 1.0}):
        x = result.choose(prefer).x
        out = folder / "-".join(prefer)
        if not out.exists():
            problem.export(x, out)
        model = _loaded(problem, out)
        live = problem.evaluate(x.unsqueeze(0), generator=make_generator(0)).Y[0].tolist()
        again = [_value(problem, name, model) for name in names]
        rows.append({"prefer": list(prefer), "x": x.tolist(), "live": live, "loaded": again})
    return rows


def _loaded(problem: ZooProblem, folder: Path) -> nn.Module:
    if isinstance(problem, TunedProblem):
        return load_pretrained(folder, problem.zoo.kind)
    model = encoder(generator=make_generator(0))
    weights = map_bo.open_checkpoint(folder)
    model.load_state_dict({name: weights.load(name) for name in weights.names})
    return model


def _value(problem: ZooProblem, name: str, model: nn.Module) -> float:
    seen = problem.evaluator(name)(model)
    return next(iter(seen.values())).value if isinstance(seen, Mapping) else seen.value


def words(numbers: Mapping[str, Any], command: str) -> str:
    """Return the numbers in Markdown."""
    lines = [f"`{command}`", "", _facts(numbers), ""]
    lines += ["| method | evaluations | hypervolume | lowest and highest of the seeds |"]
    lines += ["| :-- | --: | --: | --: |"]
    costs = {"best expert": len(numbers["metrics"]), "uniform blend": 1, "all points": ""}
    for name, value in numbers["hypervolume"].items():
        values = value if isinstance(value, list) else [value]
        ends = f"{min(values):.3f} to {max(values):.3f}" if len(values) > 1 else ""
        cost = costs.get(name, numbers["budget"])
        lines.append(f"| {name} | {cost} | {statistics.mean(values):.3f} | {ends} |")
    pairs = zip(numbers["hypervolume"]["run"], numbers["hypervolume"]["random"], strict=True)
    wins = sum(a > b for a, b in pairs)
    seconds = numbers["seconds"]
    left = max(seconds["framework"] - seconds["merging"], 0.0)
    shares = {
        name: f"{100 * value / seconds['processor']:.1f} %"
        for name, value in {
            "scoring": seconds["processor"] - seconds["framework"],
            "merging": seconds["merging"],
            "rest": left,
        }.items()
    }
    lines += [
        "",
        f"The run has more than random coefficients in {wins} of {len(numbers['seeds'])} seeds.",
        "",
        "| network | " + " | ".join(numbers["metrics"]) + " |",
        "| :-- |" + " --: |" * len(numbers["metrics"]),
    ]
    for name, row in numbers["anchors"].items():
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in row) + " |")
    lines += [
        "",
        f"One evaluation takes {seconds['evaluation']:.2f} seconds, and "
        f"{seconds['processor']:.2f} of the processor; with evaluators that score nothing it takes "
        f"{seconds['framework']:.3f} of the processor, of which {seconds['merging']:.3f} are "
        f"merging. So scoring is {shares['scoring']} of it, merging {shares['merging']}, and the "
        f"rest {shares['rest']}. Choosing and fitting take "
        f"{seconds['rest per evaluation']:.2f} seconds per evaluation beside it.",
    ]
    if numbers["exports"]:
        most = max(
            abs(a - b)
            for row in numbers["exports"]
            for a, b in zip(row["live"], row["loaded"], strict=True)
        )
        lines += [
            "",
            f"{len(numbers['exports'])} chosen points were exported, loaded and scored again: the "
            f"largest difference of a metric is {most:.2g}.",
        ]
    return "\n".join(lines)


def _facts(numbers: Mapping[str, Any]) -> str:
    found = numbers["versions"]
    seeds = numbers["seeds"]
    return (
        f"{len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'} ({', '.join(map(str, seeds))}), "
        f"{numbers['problem']['size']} held-out examples per metric; map-bo {found['map-bo']}, "
        f"torch {found['torch']}."
    )


def plot(numbers: Mapping[str, Any], found: Mapping[str, Tensor], path: Path) -> None:
    """Draw the points of the first pair of metrics, and hypervolume against evaluations."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    first = numbers["seeds"][0]
    shown = (
        (f"random {first}", "random", "0.6", "x"),
        ("grid", "common coefficient", "tab:orange", "."),
        (f"run {first}", "run", "tab:blue", "o"),
        ("experts", "experts", "tab:red", "s"),
        ("blend", "uniform blend", "tab:green", "^"),
    )
    for key, label, colour, marker in shown:
        values = found[key]
        left.scatter(values[:, 0], values[:, 1], c=colour, marker=marker, s=24, label=label)
    left.set_xlabel(f"gain of {numbers['metrics'][0]}")
    left.set_ylabel(f"gain of {numbers['metrics'][1]}")
    left.legend(fontsize=8)
    for name, colour in (("random", "0.6"), ("run", "tab:blue")):
        for i, curve in enumerate(numbers["curves"][name]):
            right.plot(range(1, len(curve) + 1), curve, c=colour, label=name if not i else None)
    for name, colour in (("grid", "tab:orange"), ("uniform blend", "tab:green")):
        right.axhline(numbers["hypervolume"][name], c=colour, ls="--", label=name)
    right.set_xlabel("evaluations")
    right.set_ylabel("scaled hypervolume")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Compare on one zoo, and write the numbers of its study."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=sorted(PROBLEMS))
    parser.add_argument("--root", type=Path, help="folder of the data sets (MAP_BO_DATA)")
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds")
    parser.add_argument("--budget", type=int, default=24, help="evaluations of each method")
    parser.add_argument("--size", type=int, help="held-out examples per metric")
    parser.add_argument("--sets", nargs="*", help="sets, one expert each")
    parser.add_argument("--out", type=Path, help="folder of the study; experiments/NAME")
    parser.add_argument("--work", type=Path, help="what is kept; in the cache by default")
    parser.add_argument(
        "--time", action="store_true", help="only measure the seconds of the recorded study anew"
    )
    options = parser.parse_args(argv)
    out = options.out or HERE / options.name
    given = {k: v for k in ("size", "sets") if (v := getattr(options, k)) is not None}
    seeds, budget = options.seeds, options.budget
    if options.time:
        numbers = json.loads((out / "numbers.json").read_text())
        given = {"size": numbers["problem"]["size"], **given}
        seeds, budget = len(numbers["seeds"]), numbers["budget"]
    problem = PROBLEMS[options.name](options.root, progress=True, **given)
    if options.time:
        numbers["seconds"] |= split_time(problem, problem.space.anchors().X[-1])
    else:
        text = json.dumps([options.name, given], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:8]
        numbers, found = compare(
            problem,
            options.work or cache_root() / "fronts" / f"{options.name}-{key}",
            seeds=range(seeds),
            budget=budget,
            say=partial(print, flush=True),
        )
        out.mkdir(parents=True, exist_ok=True)
        plot(numbers, found, out / "front.png")
    (out / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")
    command = f"python -m experiments.fronts {options.name} --seeds {seeds} --budget {budget}"
    for name, value in given.items():
        command += f" --{name} {' '.join(value) if isinstance(value, list) else value}"
    page = out / "README.md"
    before = page.read_text() if page.exists() else f"# {options.name}\n\n{FIRST}\n{LAST}\n"
    page.write_text(with_numbers(before, words(numbers, command)))


if __name__ == "__main__":
    main()
