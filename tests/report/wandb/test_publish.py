"""The W&B Report with the real library; a server on this machine stands in for the network."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from map_bo.errors import MissingDependencyError, PublishError
from map_bo.report.wandb.publish import Account, account, report_of, save_report
from map_bo.report.wandb.spec import Grid, wandb_report
from map_bo.tracking.wandb.run import WandbRun
from map_bo.tracking.wandb.service import end_service
from tests.report.fake_runs import comparison
from tests.report.wandb_runs import tracked
from tests.report.wandb_server import KEY, Server, serving

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No key but those of a test, and nothing that wandb remembers of another."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    end_service()
    yield
    end_service()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving() as found:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", found.url)
        yield found


def parts(content: Any, kind: str) -> list[dict[str, Any]]:
    """Return every part of a saved report with this ``viewType`` or ``type``."""
    if isinstance(content, list):
        return [part for one in content for part in parts(one, kind)]
    if not isinstance(content, dict):
        return []
    own = [content] if kind in (content.get("viewType"), content.get("type")) else []
    return own + [part for one in content.values() for part in parts(one, kind)]


def test_a_report_is_made_without_a_network() -> None:
    report = report_of(wandb_report(tracked(comparison(3)), entity="team"))
    assert (report.title, report.entity, report.project) == (
        "Comparison of study",
        "team",
        "merging",
    )
    kinds = {type(block).__name__ for block in report.blocks}
    assert kinds == {"H2", "MarkdownBlock", "PanelGrid"}
    drawn = [type(p).__name__ for b in report.blocks for p in getattr(b, "panels", ())]
    assert drawn == [
        "ParallelCoordinatesPlot",
        "BarPlot",
        "LinePlot",
        *["LinePlot"] * 3,
        *["CustomChart"] * 3,
        "MediaBrowser",
        *["ScatterPlot"] * 2,
    ]


@pytest.mark.slow
def test_a_saved_report_holds_words_panels_and_runs(server: Server) -> None:
    who = account()
    assert who == Account("team", server.url)
    found = tracked(comparison(2))
    spec = wandb_report(found, entity=who.entity, site=who.site)
    address = save_report(spec)
    assert address.startswith(f"{server.url}/team/merging/reports/")
    (told,) = server.saved
    assert (told["entityName"], told["projectName"]) == ("team", "merging")
    assert told["displayName"] == "Comparison of study"
    content = server.spec
    written = [block["content"] for block in parts(content, "markdown-block")]
    assert any("| surrogate | gp, quadratic |" in text for text in written)
    saved = parts(content, "panel-grid")
    assert len(saved) == sum(isinstance(block, Grid) for block in spec.blocks) == 5
    for grid in saved:
        runs = grid["metadata"]["runSets"]
        assert [one["name"] for one in runs] == ["surrogate=gp", "surrogate=quadratic"]
        assert runs[0]["project"] == {"name": "merging", "entityName": "team", "id": "7"}
        assert [
            (part["key"]["name"], part["op"], part["value"])
            for part in runs[0]["filters"]["filters"]
        ] == [("group", "IN", ["study"]), ("name", "IN", ["gp0", "gp1", "gp2", "gp3", "gp4"])]
        assert "#0072B2" in grid["metadata"]["customRunColors"].values()
    grouping = [
        [key["name"] for key in grid["metadata"]["runSets"][0]["grouping"]] for grid in saved
    ]
    assert grouping == [[], ["group"], ["group"], [], []]


def test_saved_panels_name_what_the_runs_log(server: Server) -> None:
    save_report(wandb_report(tracked(comparison(2)), entity="team"))
    content = server.spec
    names = [metric.name for metric in comparison(2).metrics]
    progress, front = (part["config"] for part in parts(content, "Run History Line Plot"))
    assert progress["xAxis"] == "evaluation"
    assert progress["metrics"] == ["hypervolume/observed points"]
    assert (progress["groupAgg"], progress["groupArea"]) == ("mean", "stderr")
    assert (front["xAxis"], front["metrics"]) == (f"metric/{names[0]}", [f"metric/{names[1]}"])
    assert front["overrideMarks"][f"gp0:metric/{names[1]}"] == "points"
    scatter = parts(content, "Scatter Plot")[0]["config"]
    assert (scatter["xAxis"], scatter["yAxis"]) == (
        "summary:evaluations",
        "summary:hypervolume/observed points",
    )
    (bars,) = parts(content, "Bar Chart")
    assert bars["config"]["metrics"][0] == "summary_metrics.hypervolume/observed points"
    (lines,) = parts(content, "Parallel Coordinates Plot")
    assert [column["accessor"] for column in lines["config"]["columns"]] == [
        "config:run.value.settings.surrogate",
        "summary:hypervolume/observed points",
    ]
    (chart,) = parts(content, "Vega2")
    assert chart["config"]["fieldSettings"]["x"] == f"predicted:{names[0]}"


def test_names_with_quotes_are_kept(server: Server) -> None:
    group = 'it\'s "one" \\ [x]'
    found = tracked(
        comparison(), lambda r: WandbRun(f"a-{r.settings['seed']}", "merging", "team", group)
    )
    save_report(wandb_report(found, entity="team"))
    runs = parts(server.spec, "panel-grid")[0]["metadata"]["runSets"]
    assert runs[0]["filters"]["filters"][0]["value"] == [group]


# What may go wrong


def test_without_a_login_it_says_what_to_do() -> None:
    with pytest.raises(PublishError, match="needs a login") as caught:
        account()
    assert "`wandb login`" in str(caught.value.hint)
    assert "WANDB_API_KEY" in str(caught.value.hint)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(MissingDependencyError) as caught:
        account({"WANDB_API_KEY": KEY})
    assert caught.value.hint == "pip install 'map-bo[wandb-report]'"
    with pytest.raises(MissingDependencyError):
        save_report(wandb_report(tracked(comparison()), entity="team"))


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_told(server: Server, status: int) -> None:
    server.status = status
    with pytest.raises(PublishError, match="cannot be made: ") as caught:
        account()
    assert "\n" not in caught.value.message
    assert "wandb login --relogin" in str(caught.value.hint)


def test_a_key_of_the_wrong_form_is_told(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(PublishError, match="40"):
        account()


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["no network", "server error"])
def test_no_answer_is_told(server: Server, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("map_bo.report.wandb.publish._PATIENCE", 1)
    server.status = 500
    if broken == "no network":
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(PublishError, match="cannot be made: "):
        account()


def test_a_run_that_records_goes_on_without_an_answer(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[bool] = []
    monkeypatch.setattr("map_bo.report.wandb.publish.end_service", lambda: ended.append(True))
    monkeypatch.setenv("WANDB_API_KEY", "of the wrong form")
    with pytest.raises(PublishError):
        account()
    assert ended == [True]
    monkeypatch.setattr("wandb.run", object())
    with pytest.raises(PublishError):
        account()
    assert ended == [True]


def test_a_key_without_an_owner_is_told(server: Server) -> None:
    server.entity = None
    with pytest.raises(PublishError, match="no user or team"):
        account()


def test_a_project_that_is_not_there_is_told(server: Server) -> None:
    server.projects = ()
    with pytest.raises(PublishError, match="'team/merging' not found") as caught:
        save_report(wandb_report(tracked(comparison()), entity="team"))
    assert "`wandb sync`" in str(caught.value.hint)
    assert "--wandb-project" in str(caught.value.hint)


def test_a_refused_report_is_told(server: Server) -> None:
    server.refuses = True
    with pytest.raises(PublishError, match="permission denied"):
        save_report(wandb_report(tracked(comparison()), entity="team"))
