from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import pytest

from map_bo.errors import PublishError
from map_bo.report.wandb.spec import (
    Bars,
    Column,
    FrontTable,
    Grid,
    Heading,
    Images,
    Lines,
    Panel,
    Parallel,
    ReportSpec,
    RunSet,
    Scatter,
    Text,
    require_tracked,
    wandb_report,
)
from map_bo.tracking.wandb.run import WandbRun
from tests.report.fake_runs import comparison, failed
from tests.report.wandb_runs import home, tracked

Kind = TypeVar("Kind")


def spec(m: int = 2, **given: Any) -> ReportSpec:
    return wandb_report(tracked(comparison(m)), entity="team", **given)


def grids(report: ReportSpec) -> list[Grid]:
    return [block for block in report.blocks if isinstance(block, Grid)]


def panels(report: ReportSpec, kind: type[Kind]) -> list[Kind]:
    return [panel for grid in grids(report) for panel in grid.panels if isinstance(panel, kind)]


def words(report: ReportSpec) -> str:
    return "\n\n".join(block.markdown for block in report.blocks if isinstance(block, Text))


def test_it_has_the_sections_and_tables_of_the_local_report() -> None:
    report = spec()
    assert [block.text for block in report.blocks if isinstance(block, Heading)] == [
        "Runs compared",
        "Quality",
        "Progress",
        "Fronts",
        "Cost against quality",
        "Scale",
        "Runs",
    ]
    text = words(report)
    for part in ("| setting | values |", "reference point", "Dominance win rate", "| pairs |"):
        assert part in text
    assert "plot:" not in text
    assert (report.project, report.entity) == ("merging", "team")
    assert report.title == "Comparison of study"


def test_runs_lead_to_the_server() -> None:
    text = words(spec(site="https://own.example"))
    assert "](https://own.example/team/merging/runs/gp0)" in text
    assert "report.html)" not in text
    found = tracked(comparison(more=[failed()]))
    assert "| surrogate=gp,seed=9 | failed | out of memory |" in words(
        wandb_report(found, entity="team")
    )


def test_the_runs_of_a_variant_are_a_set() -> None:
    first, second = grids(spec())[0].runs
    assert first == RunSet(
        name="surrogate=gp",
        project="merging",
        entity="team",
        ids=("gp0", "gp1", "gp2", "gp3", "gp4"),
        groups=("study",),
        colour="#0072B2",
    )
    assert second.name == "surrogate=quadratic"
    assert second.colour != first.colour
    assert all(grid.runs == (first, second) for grid in grids(spec()))


def test_the_panels_of_two_metrics() -> None:
    report = spec()
    observed = "hypervolume/observed points"
    assert panels(report, Parallel) == [
        Parallel(
            "Settings that vary",
            (
                Column("run.settings.surrogate", "surrogate", True),
                Column(observed, "hypervolume of observed points", False),
            ),
        )
    ]
    progress, front = panels(report, Lines)
    assert (progress.x, progress.y, progress.mean) == ("evaluation", (observed,), True)
    names = [metric.name for metric in comparison().metrics]
    assert (front.x, front.y, front.mean) == (f"metric/{names[0]}", (f"metric/{names[1]}",), False)
    (table,) = panels(report, FrontTable)
    assert (table.table, table.x, table.y) == (
        "front",
        f"predicted:{names[0]}",
        f"predicted:{names[1]}",
    )
    assert [(panel.x, panel.y) for panel in panels(report, Scatter)] == [
        ("evaluations", observed),
        ("seconds/evaluate", observed),
    ]
    (bars,) = panels(report, Bars)
    assert bars.names == (observed, "hypervolume/verified points", "hypervolume/predicted front")
    assert panels(report, Images) == [Images("Front of each run", ("plots/front",))]
    assert [grid.grouped for grid in grids(report)] == [False, True, True, False, False]


@pytest.mark.parametrize(("m", "pairs"), [(1, 0), (3, 3), (4, 6), (6, 5)])
def test_fronts_are_shown_pair_by_pair(m: int, pairs: int) -> None:
    report = spec(m)
    assert len(panels(report, FrontTable)) == pairs
    assert len(panels(report, Lines)) == 1 + max(pairs, 1)


def test_a_prefix_stands_before_every_name() -> None:
    found = tracked(comparison(), lambda record: replace(home(record), prefix="a/"))
    report = wandb_report(found, entity="team")

    def names(panel: Panel) -> tuple[str, ...]:
        match panel:
            case Lines():
                return (panel.x, *panel.y)
            case Scatter():
                return (panel.x, panel.y)
            case Bars() | Images():
                return panel.names
            case Parallel():
                return tuple(c.name for c in panel.columns if not c.setting)
            case FrontTable():
                return (panel.table,)

    for grid in grids(report):
        for panel in grid.panels:
            assert all(name.startswith("a/") for name in names(panel))


def test_settings_are_known_by_their_place_in_the_configuration() -> None:
    found = tracked(comparison())
    runs = tuple(
        replace(run, record=replace(run.record, settings={**run.record.settings, "loop.budget": i}))
        for run, i in zip(found.runs, "0123456789", strict=True)
    )
    found = replace(found, runs=runs, keys=("surrogate", "loop.budget", "sweep"))
    found = replace(found, values=dict.fromkeys(found.keys, ("x",)))
    (panel,) = panels(wandb_report(found, entity="team"), Parallel)
    assert [column.name for column in panel.columns if column.setting] == [
        "choices.surrogate",
        "loop.budget",
    ]


def test_projects_and_owners_are_kept_apart() -> None:
    def where(record: Any) -> WandbRun:
        own = home(record)
        return replace(own, project="other", entity="me", group=None) if "1" in own.id else own

    report = wandb_report(tracked(comparison(), where), entity="team")
    runs = grids(report)[0].runs
    assert [(r.entity, r.project, r.name, r.groups) for r in runs[:2]] == [
        ("team", "merging", "surrogate=gp (team/merging)", ("study",)),
        ("me", "other", "surrogate=gp (me/other)", ()),
    ]
    assert len({r.name for r in runs}) == len(runs) == 4
    assert runs[0].colour == runs[1].colour


@pytest.mark.parametrize(
    ("place", "found"), [("x", ("team", "x")), ("me/x", ("me", "x")), (None, ("team", "merging"))]
)
def test_runs_may_be_elsewhere(place: str | None, found: tuple[str, str]) -> None:
    report = spec(place=place)
    assert (report.entity, report.project) == found
    assert {(r.entity, r.project) for r in grids(report)[0].runs} == {found}


def test_runs_without_wandb_are_told() -> None:
    with pytest.raises(PublishError, match="none of the 10 finished runs was tracked") as caught:
        require_tracked(comparison())
    assert "tracking=[local,wandb]" in str(caught.value.hint)
    with pytest.raises(PublishError, match="was tracked with wandb"):
        wandb_report(comparison(), entity="team")
    found = tracked(comparison(), lambda r: home(r) if r.settings["seed"] != "0" else None)
    report = wandb_report(found, entity="team")
    assert "2 of 10 finished runs were not tracked with wandb" in words(report)
    assert "| surrogate=gp, seed 0 |" in words(report)
    found = tracked(
        comparison(), lambda r: replace(home(r), prefix="b/" if r.settings["seed"] == "0" else "")
    )
    assert "2 runs logged under another prefix" in words(wandb_report(found, entity="team"))


def test_a_long_title_is_cut() -> None:
    found = replace(tracked(comparison()), title="x" * 300)
    assert len(wandb_report(found, entity="team").title) == 128
