"""A value of a wrong kind, for any key of the configuration, is one clear error."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from map_bo.app.build import _build as instance
from map_bo.app.build import build_nested, build_problem, build_settings, build_tracking
from map_bo.app.jobs import RENAMED
from map_bo.app.main import main
from map_bo.app.schema import register
from map_bo.errors import ConfigError, DataError, MapBoError
from map_bo.problems.botorch_functions import BotorchProblem

CONF = Path(__file__).parents[2] / "conf"
VALUES = [
    *(None, math.inf, -math.inf, math.nan, 0, -1, 3.5, 5, 10**30, True, "", "x", "a:b"),
    *([], [1], ["x"], {}, {"a": 1}, {"_target_": 3}, {"_target_": "map_bo.nothing"}),
]
WRITTEN = [
    "null",
    "inf",
    "[]",
    "{}",
    "x",
    "-1",
    "1e400",
    "nan",
    "0",
    "3.5",
    "true",
    "[1]",
    "{a: 1}",
]
SMALL = [
    *("problem=concave", "problem.d=2", "problem.m=2", "surrogate=quadratic", "sampler=sobol"),
    *("solver.points=10", "loop.budget=8", "loop.verify=1", "progress=false", "tracking=none"),
]
GROUPS = ("problem", "operator", "surrogate", "sampler", "solver", "nested", "tracking")
TRAINS = ("digits", "images", "text", "decoder")  # experts, for every value that is possible


def options() -> list[tuple[str, str]]:
    return [
        (group, file.stem)
        for group in GROUPS
        for file in sorted((CONF / group).glob("*.yaml"))
        if (group, file.stem) not in RENAMED and file.stem not in (*TRAINS, "none")
    ]


def keys(node: Any, above: str) -> Iterator[str]:
    """Every key below; of members that are alike (the eight tasks of a suite), the first one's."""
    seen: set[tuple[str, ...]] = set()
    for key in node if isinstance(node, Mapping) else ():
        yield f"{above}.{key}"
        if OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key):
            continue
        if isinstance(node[key], Mapping):
            alike = tuple(sorted(map(str, node[key])))
            if alike in seen:
                continue
            seen.add(alike)
        yield from keys(node[key], f"{above}.{key}")


def failure(call: Callable[[], object]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def builders(group: str) -> Callable[[DictConfig], object]:
    """Return what builds a group; an operator is built with a problem, but needs no model here."""
    if group == "operator":
        return lambda config: instance(config, group)
    if group == "problem":
        return lambda config: (problem := build_problem(config)).space.d + len(problem.metrics)
    return {"nested": build_nested, "tracking": build_tracking}.get(group, build_settings)


def build(config: DictConfig) -> None:
    build_settings(config)
    build_nested(config)
    build_tracking(config)
    problem = build_problem(config)
    assert problem.space.d >= 1
    assert problem.metrics


@pytest.fixture
def hydra() -> Iterator[None]:
    register()
    with initialize_config_module("map_bo.conf", version_base="1.3"):
        yield


def cases() -> Iterator[Any]:
    """Every option of every group; those that are not of the first of its kind are slow."""
    quick = {"concave", "botorch", "checkpoints", "ties", "quadratic", "sobol", "gradient"}
    quick |= {"adaptive", "fronts", "wandb"}
    for group, name in options():
        marks = [] if name in quick else [pytest.mark.slow]
        yield pytest.param(group, name, marks=marks)


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize(("group", "name"), list(cases()))
def test_every_key_of_every_group(group: str, name: str) -> None:
    chosen = SMALL if group == "tracking" else [o for o in SMALL if not o.startswith(f"{group}.")]
    config = compose("config", overrides=[*chosen, f"{group}={name}"])
    if builders(group) is not build_settings:  # a small configuration is copied faster
        config = OmegaConf.create({group: OmegaConf.to_container(config[group], resolve=True)})
    for key in [group, *keys(config[group], group)]:
        for value in VALUES:
            changed = config.copy()
            try:
                with open_dict(changed):
                    OmegaConf.update(changed, key, value, merge=False)
            except OmegaConfBaseException:
                continue  # as the command line tells it
            said = failure(partial(builders(group), changed))
            assert said is None or isinstance(said, MapBoError), f"{key}={value!r}: {said!r}"


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["problem.d=3.5"], r"problem\.d must be a whole number, got 3\.5"),
        (["problem.d=inf"], r"problem\.d must be a whole number, got inf"),
        (["solver.points=1e400"], r"solver\.points must be a whole number, got inf"),
        (["solver.points=null"], "solver cannot be built"),
        (["loop.reference=5"], r"loop\.reference must give a number per metric, got 5"),
        (["+sampler.seed={a: 1}"], "sampler has no option 'seed'"),
        (["sampler=ucb", "sampler.surrogate=5"], r"sampler\.surrogate must be .* _target_ or null"),
        (["problem.d=1000000000"], "must be at most 1000000, got 1000000000"),
        (["problem.d=100000"], "have curvatures of"),
        (["problem._target_=map_bo.rng"], "cannot be called"),
    ],
)
def test_a_wrong_kind_is_told(overrides: list[str], message: str) -> None:
    with pytest.raises((ConfigError, MapBoError), match=message):
        build(compose("config", overrides=[*SMALL, *overrides]))


def test_a_function_of_too_many_coefficients_is_told_at_once() -> None:
    for wrong in ({"dim": 10**9}, {"num_objectives": 10**9}, {"dim": 0}, {"dim": 2.5}):
        with pytest.raises(DataError, match="must be a whole number from 1 to"):
            BotorchProblem("DTLZ2", **wrong)


def told(capsys: pytest.CaptureFixture[str], run: Path, *overrides: str) -> None:
    try:
        main(["run", *SMALL, f"hydra.run.dir={run}", *overrides])
    except SystemExit as error:
        assert error.code == 2, overrides  # noqa: PT017
        assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *itertools.product(GROUPS, ["null"]),
        *((k, v) for k, v in zip(GROUPS, ["inf", "5", "[1]"] * 3, strict=False)),
        ("hydra.verbose", "1e400"),
    ],
)
def test_a_group_that_is_no_name_is_told(
    key: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", *SMALL, f"hydra.run.dir={tmp_path / 'run'}", f"{key}={value}"])
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert "error: " in said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "events.jsonl").exists()


@pytest.mark.parametrize(
    "override", ["loop.reference=5", "loop.verify=99", "loop.stop=x", "seed={}"]
)
def test_a_wrong_setting_is_told(
    override: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", *SMALL, f"hydra.run.dir={tmp_path / 'run'}", override])
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_key_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    register()
    with initialize_config_module("map_bo.conf", version_base="1.3"):
        config = compose("config", overrides=SMALL)
    every = ["seed", "progress", "start_from", *keys(config.loop, "loop")]
    every += [
        key
        for group in ("problem", "surrogate", "sampler", "solver")
        for key in keys(config[group], group)
    ]
    every += [f"hydra.{key}" for key in ("verbose", "output_subdir", "job.name", "job.chdir")]
    tell = partial(told, capsys)
    for number, (key, value) in enumerate(itertools.product(every, WRITTEN)):
        tell(tmp_path / f"run{number}", f"{key}={value}")


def test_a_mistake_is_told_without_the_overrides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", *SMALL, f"hydra.run.dir={tmp_path / 'run'}", "loop.verify=99"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("sampler=sobl", "did you mean 'sobol'?"),
        ("operator=zzz", "choose from breadcrumbs, "),
        ("workers=two", "choose from dask, inline, processes, ray; workers=4 is short for"),
    ],
)
def test_an_option_that_is_none_of_a_group_is_told_with_the_nearest(
    override: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", *SMALL, f"hydra.run.dir={tmp_path / 'run'}", override])
    said = capsys.readouterr().err
    group, _, option = override.partition("=")
    assert caught.value.code == 2
    assert said.startswith(f"error: {group} has no option {option!r}\nhint: {hint}")
