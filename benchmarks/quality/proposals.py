"""Which surrogate the default sampler should look through: the run's own, or a cheaper one.

python -m benchmarks.quality.proposals                    goes on where it was stopped
python -m benchmarks.quality.proposals --budget 48        the same cells up to 48 evaluations
python -m benchmarks.quality.proposals --tables           run nothing, write what there is
python -m benchmarks.quality.proposals --smoke            tiny, nothing recorded: does it run?

The methods (``benchmarks.quality.methods.PROPOSALS``) differ in the surrogate of their sampler
alone; all of them solve their front on ``auto``. Cells are kept under ``.bench_cache/proposals``.
Rows go to ``benchmarks/results/proposals.csv``, the tables to ``docs/evidence/proposals.md``.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from textwrap import fill

from benchmarks.quality import kept
from benchmarks.quality.analysis import Difference, paired, values
from benchmarks.quality.methods import PROPOSALS
from benchmarks.quality.study import Study
from benchmarks.quality.tables import NOTHING, markdown
from benchmarks.quality.tidy import Row, read
from benchmarks.record import RESULTS, finish

__all__ = ["BASELINE", "CASES", "DOCUMENT", "SETTLED", "document", "seconds", "tables", "verdicts"]

DOCUMENT = Path(__file__).parents[2] / "docs" / "evidence" / "proposals.md"
CACHE = Path(".bench_cache") / "proposals"
TABLE = "proposals.csv"
KNOWN = "quality_known.json"

SETTLED = (
    *("digits-mlp-4", "digits-mlp-8", "digits-cnn-4"),
    *("digits-mlp-4-noisy", "digits-mlp-8-noisy", "digits-cnn-4-noisy", "blocks-12"),
)
"""Cases on which defaults of the sampler or of ``auto`` were settled before."""
FRESH = ("images-4", "images-4-noisy", "plateau-4")
CASES = (*SETTLED, *FRESH)
EXACT = tuple(case for case in CASES if not case.endswith("-noisy"))
NOISY = tuple(case for case in CASES if case.endswith("-noisy"))
GROUPS = {
    "all": CASES,
    "exact": EXACT,
    "noisy": NOISY,
    "defaults settled here": SETTLED,
    "other cases": FRESH,
}
BASELINE = "proposals-auto"
BUDGETS = (12, 24, 48)
MEASURES = {
    "regret": ("regret", False),
    "regret_solved": ("regret, refined", False),
    "share": ("share of hypervolume", True),
}
"""Column of the table -> what documents call it, and whether more of it is better."""


@dataclass(frozen=True)
class Proposals(Study):
    """The study with a table of its own, and what is known of each case from the large one."""

    @property
    def table(self) -> Path:
        """The table."""
        return self.results / TABLE

    @property
    def known(self) -> Path:
        """The best known of each case: that of the large study, and what is found here."""
        return self.cache / KNOWN


def seconds(rows: Sequence[Row], case: str, name: str) -> float | None:
    """Return the median over seeds of the seconds per proposal from 12 to 24 evaluations."""
    spent: dict[int, dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row["case"] == case and row["method"] == name and row.get("propose_s") is not None:
            spent[row["seed"]][row["evaluations"]] = row["propose_s"]
    each = [(own[24] - own[12]) / 12 for own in spent.values() if {12, 24} <= own.keys()]
    return median(each) if each else None


def tables(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Return all tables by name."""
    return {
        "groups": _differences(rows, GROUPS),
        "cases": _differences(rows, {case: (case,) for case in CASES}),
        "seconds": _seconds(rows),
        "levels": _levels(rows),
    }


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Return for each other surrogate how often it is clearly better or worse, case by case."""
    lines = []
    for name in _others(rows):
        for measure, (title, larger) in MEASURES.items():
            found = [
                difference.verdict(larger_is_better=larger)
                for case in CASES
                for n in BUDGETS
                if (difference := _against(rows, name, measure, n, (case,))) is not None
            ]
            lines.append(
                f"- {_short(name)}, {title}: clearly better in {found.count('better')}, clearly "
                f"worse in {found.count('worse')} of {len(found)} comparisons (case, evaluations)"
            )
    return lines or NOTHING


def _short(name: str) -> str:
    return name.removeprefix("proposals-")


def _others(rows: Sequence[Row]) -> list[str]:
    held = {row["method"] for row in rows}
    return [name for name in PROPOSALS if name in held and name != BASELINE]


def _against(
    rows: Sequence[Row], name: str, measure: str, evaluations: int, cases: Sequence[str]
) -> Difference | None:
    return paired(rows, name, BASELINE, measure, evaluations=evaluations, cases=cases)


def _differences(rows: Sequence[Row], groups: Mapping[str, Sequence[str]]) -> list[str]:
    body = []
    for name in _others(rows):
        for group, cases in groups.items():
            for n in BUDGETS:
                cells = [_short(name), group, str(n)]
                pairs = ""
                for measure, (_, larger) in MEASURES.items():
                    found = _against(rows, name, measure, n, cases)
                    if found is not None:
                        cells += [str(found), found.verdict(larger_is_better=larger)]
                        pairs = f"{found.pairs} on {found.cases}"
                if pairs:
                    body.append([*cells, pairs])
    head = ["proposals by", "cases", "evaluations"]
    for title, _ in MEASURES.values():
        head += [title, ""]
    return markdown([*head, "pairs on cases"], body)


def _seconds(rows: Sequence[Row]) -> list[str]:
    names = [BASELINE, *_others(rows)]
    body = []
    for case in CASES:
        held = [seconds(rows, case, name) for name in names]
        if any(value is not None for value in held):
            body.append([case, *("" if value is None else f"{value:.2f}" for value in held)])
    return markdown(["case", *map(_short, names)], body)


def _levels(rows: Sequence[Row]) -> list[str]:
    names = [BASELINE, *_others(rows)]
    body = []
    for n in BUDGETS:
        found = {measure: values(rows, measure, evaluations=n) for measure in ("regret", "share")}
        for case in CASES:
            cells = []
            for name in names:
                held = [list(found[m].get((case, name), {}).values()) for m in ("regret", "share")]
                cells.append(f"{mean(held[0]):.4f} / {mean(held[1]):.3f}" if all(held) else "")
            if any(cells):
                body.append([case, str(n), *cells])
    return markdown(["case", "evaluations", *map(_short, names)], body)


def document(rows: Sequence[Row]) -> str:
    """Return the text of ``docs/evidence/proposals.md``."""
    found = tables(rows)
    seeds = len({row["seed"] for row in rows})
    return f"""# The surrogate behind the proposals

Written by `python -m benchmarks.quality.proposals`, none of it by hand; the rows are in
[`benchmarks/results/proposals.csv`](../../benchmarks/results/{TABLE}).

The default sampler chooses each evaluation by the posterior of a surrogate. Is it better to look
through the run's own surrogate, `auto`, on which the front is solved in the end, or through one
that is fitted for the proposals alone? Here the sampler is given its surrogate explicitly;
everything else is the default, and every front is solved on `auto`. Measures and protocol are
those of [the evidence](../evidence.md#how-it-was-measured): {seeds} paired seeds, one proposal at a
time up to 24 evaluations, all of them spent on the search.

Each number is the mean of a surrogate less that of `auto`, with its 95 % bootstrap interval over
seeds, each case with the same weight. *Regret*: of the choice among the front's points. *Regret,
refined*: of the choice after the surrogate was solved for that preference, as `Result.choose` does.
*Share*: of the best known hypervolume. A verdict is about the surrogate that is named, not `auto`.

{_settled()}

## Over all cases

{_joined(found["groups"])}

## Case by case

{_joined(verdicts(rows))}

{_joined(found["cases"])}

## Seconds per proposal

Median over seeds of the mean from 12 to 24 evaluations, fit included, on one thread of a machine
that had other work to do, all methods in turn: good for ratios.

{_joined(found["seconds"])}

## Regret and share of hypervolume

Means over seeds, regret / share.

{_joined(found["levels"])}
"""


def _settled() -> str:
    settled, fresh = (", ".join(f"`{case}`" for case in cases) for cases in (SETTLED, FRESH))
    text = (
        f"Defaults of the sampler and of `auto` were settled before on {settled} or on cases of "
        f"the same kind, with proposals by the quadratic. None was settled on {fresh}."
    )
    return fill(text, 100)


def _joined(lines: Sequence[str]) -> str:
    return "\n".join(lines)


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--methods", nargs="+", default=list(PROPOSALS), choices=list(PROPOSALS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--budget", type=int, default=24, help="evaluations of a run")
    parser.add_argument("--jobs", type=int, default=1, help="processes; 0 runs in this one")
    parser.add_argument("--deadline", type=float, help="seconds after which to stop and record")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing recorded")
    parser.add_argument("--tables", action="store_true", help="run nothing, write what there is")
    parser.add_argument("--out", type=Path, help="record the tables as JSON")
    return parser.parse_args(arguments)


def study(options: argparse.Namespace, scratch: Path) -> Proposals:
    return Proposals(
        cases=tuple(["concave-2"] if options.smoke else options.cases),
        methods=tuple(options.methods),
        seeds=1 if options.smoke else options.seeds,
        budget=min(options.budget, 6) if options.smoke else options.budget,
        jobs=0 if options.smoke else options.jobs,
        deadline=options.deadline,
        cache=scratch if options.smoke else CACHE,
        results=scratch if options.smoke else RESULTS,
    )


def run(options: argparse.Namespace, scratch: Path) -> list[Row]:
    made = study(options, scratch)
    if options.tables:
        # Cells are not committed; without them the recorded rows are all there is.
        if made.known.exists():
            made.gather()
        return read(made.table)
    if not options.smoke:
        kept.restore()
    if not made.known.exists():
        made.known.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(RESULTS / KNOWN, made.known)
    made.run(lambda line: print(line, flush=True))
    return read(made.table)  # as anybody reads them: rounded


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        rows = run(options, Path(scratch))
    finish(
        "proposals",
        [line for name, lines in tables(rows).items() for line in (f"### {name}", "", *lines, "")],
        {"rows": len(rows), "seconds": time.perf_counter() - start, "settled": SETTLED},
        options.out,
    )
    if not options.smoke:
        DOCUMENT.write_text(document(rows))


if __name__ == "__main__":
    main()
