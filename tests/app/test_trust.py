"""Opening the directory of somebody else runs none of its code, whatever the command."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from map_bo.app.arguments import with_bare_trust
from map_bo.app.main import main
from map_bo.app.trust import _located, foreign_code, recorded_configuration, trust_words
from map_bo.errors import ConfigError
from map_bo.tracking.jsonl import JsonlStore
from map_bo.tracking.store import Event

SMALL = [
    "problem=concave",
    "problem.d=2",
    "problem.m=2",
    "surrogate=quadratic",
    "sampler=sobol",
    "solver.points=10",
    "loop.budget=8",
    "loop.verify=0",
    "progress=false",
]
PAYLOAD = """
import pathlib
pathlib.Path({marker!r}).write_text(__name__)
class Problem:
    def __init__(self, *args, **kwargs):
        pathlib.Path({marker!r}).write_text("built")
def score(model=None):
    pathlib.Path({marker!r}).write_text("called")
    return 0.5
"""
Change = Callable[[dict[str, Any]], None]


def say(**node: Any) -> dict[str, Any]:
    """Return a node for Hydra; ``target`` is its ``_target_``."""
    return {"_target_": node.pop("target"), **node}


IMPORTED = "map_bo.problems.merged.imported.imported_problem"
HF = "map_bo.problems.merged.hf.hf_problem"
CONCAVE = "map_bo.problems.synthetic.ConcaveQuadratics"
FILES = {"base": "base", "experts": {"a": "a"}}
HOSTILE: dict[str, Any] = {
    "class": say(target="payload.Problem"),
    "function": say(target="os.system", command="touch {marker}"),
    "positional": say(target="os.system", _args_=["touch {marker}"]),
    "exec": say(target="builtins.exec", _args_=["open('{marker}', 'w')"]),
    "getter": say(target="hydra.utils.get_method", path="payload.score"),
    "getter of a registered name": say(target="hydra.utils.get_object", path="os.system"),
    "instantiate": say(
        target="hydra.utils.instantiate", config=say(target="payload.Problem"), _recursive_=False
    ),
    "call": say(target="hydra.utils.call", _args_=[say(target="payload.Problem")]),
    "partial": say(target=CONCAVE, d=2, m=2, _partial_=True),
    "nested": say(target=CONCAVE, d=2, m=say(target="payload.score")),
    "nested in a list": say(target=CONCAVE, d=2, m=[1, {"x": [say(target="payload.score")]}]),
    "nested in arguments": say(target=CONCAVE, _args_=[say(target="payload.score")]),
    "beside data": {"x": say(target="payload.score")},
    "environment": say(target=CONCAVE, d="${oc.env:HOME}", m=2),
    "decoded": say(target=CONCAVE, d="${oc.decode:'[1]'}", m=2),
    "interpolated key": say(target=CONCAVE, **{"${oc.env:HOME}": 1}),
    "interpolated target": say(target="${oc.env:HOME}"),
    "no name": say(target="payload.Problem; import os"),
    "no text": say(target=["payload.Problem"]),
    "writes files": say(target="map_bo.tracking.jsonl.JsonlStore.create", directory="{marker}"),
    "module of map_bo": say(target="map_bo.plain.import_module", name="payload"),
    "model": say(
        target=IMPORTED, model="payload:score", evaluators={"a": "payload:score"}, **FILES
    ),
    "model of the library": say(target=IMPORTED, model="os:abort", evaluators={}, **FILES),
    "evaluator": say(target=IMPORTED, model=None, evaluators={"a": "payload:score"}, **FILES),
    "evaluator as a class": say(
        target=IMPORTED, evaluators={"a": say(target="payload.Problem")}, **FILES
    ),
    "dotted evaluator": say(target=IMPORTED, tasks={"x": "payload:score"}, **FILES),
    "batches": say(target=IMPORTED, recalibration="payload:score", **FILES),
    "kind of a task": say(target=HF, tasks={"a": {"kind": "payload:score"}}, **FILES),
    "grader of a task": say(
        target=HF,
        tasks={"a": {"kind": "generation", "data": "x", "grader": "payload:score"}},
        **FILES,
    ),
    "task as text": say(target=HF, tasks={"a": "payload:score"}, **FILES),
    "task as a class": say(target=HF, tasks={"a": say(target="payload.Problem")}, **FILES),
    "deep in a task": say(
        target=HF, tasks={"a": {"kind": "payload:score", "x": [say(target="os.abort")]}}, **FILES
    ),
    "environment in a task": say(target=HF, tasks={"a": {"kind": "${oc.env:HOME}"}}, **FILES),
    "model of tasks": say(target=HF, model="payload:score", tasks={}, **FILES),
    "tasks of the harness": say(
        target=HF,
        tasks={"a": {"kind": "lm_eval", "tasks": "b", "include_path": "tasks"}},
        **FILES,
    ),
    "code that a model writes": say(
        target=HF, tasks={"a": {"kind": "lm_eval", "tasks": "b", "unsafe_code": True}}, **FILES
    ),
    "code of a model": say(target=IMPORTED, trust_remote_code=True, **FILES),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trust") / "run"
    main(["run", *SMALL, f"hydra.run.dir={run}"])
    return run


@pytest.fixture
def theirs(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from somebody else, in which modules wait to be imported, entered by the user."""
    text = PAYLOAD.format(marker=str(tmp_path / "ran"))
    folder = tmp_path / "theirs"
    for where in (folder, folder / "run"):
        where.mkdir()
        for name in ("payload", "sitecustomize", "usercustomize", "transformers_modules", "conf"):
            (where / f"{name}.py").write_text(text)
        (where / "evil.dist-info").mkdir()
        (where / "evil.dist-info" / "METADATA").write_text("Name: evil\nVersion: 1\n")
        (where / "evil.dist-info" / "entry_points.txt").write_text(
            "[map_bo.problems]\nevil = payload:Problem\n[map_bo.evaluators]\nx = payload:score\n"
        )
        (where / "matplotlibrc").write_text("backend: module://payload\n")
    hydra = folder / "run" / ".hydra"
    hydra.mkdir()
    for name in ("config.yaml", "hydra.yaml", "overrides.yaml"):
        (hydra / name).write_text("!!python/object/apply:payload.score []\n")
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "payload", raising=False)
    return folder


def record(finished: Path, run: Path, change: Change) -> None:
    """Write the record of a run again, with other data of its first event."""
    store = JsonlStore.create(run)
    for event in JsonlStore.open(finished).read():
        data = copy.deepcopy(dict(event.data))
        if event.kind == "created":
            change(data)
        store.append(Event(event.kind, data, event.time))


def with_marker(node: Any, marker: Path) -> Any:
    return json.loads(json.dumps(node).replace("{marker}", str(marker)))


def status(*arguments: str) -> int:
    try:
        main(list(arguments))
    except SystemExit as error:
        return int(error.code or 0)
    return 0


@pytest.mark.parametrize(
    ("command", "what"),
    [(command, what) for command in ("resume", "merge") for what in HOSTILE]
    + [(command, what) for command in ("choose", "report") for what in ("exec", "evaluator")],
)
def test_a_record_runs_no_code(
    command: str,
    what: str,
    theirs: Path,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    node = with_marker(HOSTILE[what], tmp_path / "ran")

    def change(data: dict[str, Any]) -> None:
        data["config"]["cwd"] = str(theirs)
        data["config"]["tree"]["problem"] = node

    record(finished, theirs / "run", change)
    before = list(sys.path)
    more = {"merge": ["--point", "0", "--out", str(tmp_path / "out")]}.get(command, [])
    code = status(command, "run", *more)
    said = capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()
    assert "payload" not in sys.modules
    assert sys.path == before
    assert Path.cwd() == theirs
    assert "Traceback" not in said
    assert code == (0 if command in ("choose", "report") else 2), said
    if code and what in ("class", "evaluator", "nested"):
        assert "names payload" in said
        assert "--trust payload\n" in said


@pytest.mark.parametrize("command", ["resume", "merge", "choose", "report"])
@pytest.mark.parametrize("group", ["surrogate", "sampler", "solver", "tracking", "nested"])
def test_no_part_of_a_record_runs_code(
    command: str, group: str, theirs: Path, finished: Path, tmp_path: Path
) -> None:
    def change(data: dict[str, Any]) -> None:
        node: Any = say(target="payload.Problem")
        data["config"]["cwd"] = str(theirs)
        data["config"]["tree"][group] = {"x": node} if group == "tracking" else node
        if group in ("surrogate", "sampler", "solver"):
            data["settings"][group] = {"class": "payload:Problem", "fields": {}}

    record(finished, theirs / "run", change)
    before = list(sys.path)
    more = {"merge": ["--point", "0", "--out", str(tmp_path / "out")]}.get(command, [])
    code = status(command, "run", *more)
    assert not (tmp_path / "ran").exists()
    assert "payload" not in sys.modules
    assert sys.path == before
    # A concave function has no model to write.
    assert code == (0 if command in ("choose", "report") else 2)


def test_the_configuration_of_a_folder_is_not_loaded(theirs: Path, tmp_path: Path) -> None:
    """Hydra would unpickle what --experimental-rerun names."""
    (theirs / "config.pickle").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    for option in ("--experimental-rerun", "--exp"):
        assert status("run", option, "config.pickle") == 2
    assert not (theirs / "ran").exists()
    assert not (tmp_path / "ran").exists()


def test_trust_runs_what_was_named(theirs: Path, finished: Path, tmp_path: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["config"]["cwd"] = str(theirs)
        data["config"]["tree"]["problem"] = say(target="payload.Problem")

    record(finished, theirs / "run", change)
    assert status("resume", "run", "--trust", "other") == 2
    assert not (tmp_path / "ran").exists()
    before = list(sys.path)
    for trust in (["--trust", "payload", "run"], ["run", "--trust"], ["--trust", "run"]):
        assert status("resume", *trust) == 2  # it builds something that is no problem
        assert (tmp_path / "ran").read_text() == "built"
        assert sys.path == before
        (tmp_path / "ran").unlink()
    sys.modules.pop("payload")


def test_a_run_of_built_in_parts_needs_no_trust(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    record(finished, tmp_path / "run", lambda data: None)
    for command in ("choose", "report", "resume"):
        assert status(command, "run") == 0


def test_every_configured_part_is_built_in() -> None:
    conf = Path(__file__).parents[2] / "conf"
    files = [
        file
        for group in ("operator", "surrogate", "sampler", "solver", "problem", "nested")
        for file in (conf / group).rglob("*.yaml")
        if "_target_" in file.read_text()
    ]
    assert len(files) > 40
    for file in files:
        node: Any = OmegaConf.to_container(OmegaConf.load(file))
        for interpolated in ("operator", "progress"):  # which records have resolved
            node.pop(interpolated, None)
        assert foreign_code({"problem": node}) == [], file


def test_relative_paths_lead_to_where_the_run_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, here = tmp_path / "before", tmp_path / "here"
    for folder in (before, here):
        folder.mkdir()
    (before / "a.safetensors").write_bytes(b"")
    monkeypatch.chdir(here)
    node = say(target=IMPORTED, base="a.safetensors", experts={"x": "gone"}, dtype="a.safetensors")
    told = {"tree": {"problem": node, "start_from": None}, "cwd": str(before)}
    with recorded_configuration("run", told) as config:
        assert config.problem.base == str(before / "a.safetensors")
        assert config.problem.experts.x == "gone"
        assert config.problem.dtype == "a.safetensors"
        assert Path.cwd() == here


def test_relative_paths_of_tasks_lead_there_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    block = {"path": "a.csv", "split": "a.csv"}
    tasks = {"x": {"kind": "a.csv", "data": block}, "y": {"data": "a.csv", "tokenizer": "gone"}}
    tree = {"problem": say(target=HF, base="b", experts={}, tasks=tasks)}
    there = str(tmp_path / "a.csv")
    assert _located(tree, tmp_path)["problem"]["tasks"] == {
        "x": {"kind": "a.csv", "data": {"path": there, "split": "a.csv"}},
        "y": {"data": there, "tokenizer": "gone"},
    }


@pytest.mark.parametrize(
    "config",
    [None, 3, [], {}, {"tree": None}, {"tree": 3}, {"tree": []}, {"cwd": "x"}],
)
def test_a_record_without_a_configuration_is_told(config: Any) -> None:
    with (
        pytest.raises(ConfigError, match="was not started by"),
        recorded_configuration("run", config),
    ):
        pass


def test_nesting_is_bounded() -> None:
    deep: Any = 1
    for _ in range(60):
        deep = {"x": deep}
    with pytest.raises(ConfigError, match="nested too deeply"):
        foreign_code({"problem": deep})


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (say(target=CONCAVE, d=2), ""),
        (say(target="mine.Problem"), " --trust mine"),
        (
            say(target=IMPORTED, model="mine:m", evaluators={"a": "b.c:d"}),
            " --trust mine --trust b",
        ),
        (say(target=IMPORTED, model="mine:m", trust_remote_code=True), " --trust"),
        (say(target=HF, tasks={"a": {"kind": "perplexity", "data": "mine:data"}}), ""),
        (say(target=HF, tasks={"a": {"kind": "torch", "loader": "mine:load"}}), " --trust mine"),
    ],
)
def test_the_words_of_trust(node: Mapping[str, Any], words: str) -> None:
    assert trust_words({"tree": {"problem": node}}) == words


def test_trust_alone_takes_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "events.jsonl").touch()
    assert with_bare_trust(["resume", "--trust", "run"]) == ["resume", "--trust=*", "run"]
    assert with_bare_trust(["--trust", "a.b", "run"]) == ["--trust", "a.b", "run"]
    assert with_bare_trust(["--trust", "runs/x"]) == ["--trust=*", "runs/x"]
    assert with_bare_trust(["--trust", "--out", "x"]) == ["--trust=*", "--out", "x"]
    assert with_bare_trust(["run", "--trust"]) == ["run", "--trust=*"]
    assert os.path.isdir("run")


def test_a_factory_of_workers_is_code_and_their_other_settings_are_not() -> None:
    node = {"_target_": "map_bo.workers.processes.Processes", "count": 2, "logs": "a:b"}
    assert foreign_code({"workers": node}) == []
    [found] = foreign_code({"workers": {**node, "factory": "mine.problems:make"}})
    assert (found.where, found.package) == ("workers.factory", "mine")


def test_a_recipe_in_a_record_is_not_built_from_it() -> None:
    recipe = {"_target_": "map_bo.workers.recipe.Recipe", "factory": "os:system", "args": ["no"]}
    node = {"_target_": "map_bo.workers.processes.Processes", "count": 2, "recipe": recipe}
    found = foreign_code({"workers": node})
    assert [one.named for one in found] == ["map_bo.workers.recipe.Recipe", "os:system"]
