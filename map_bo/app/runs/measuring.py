"""``--measure`` and ``map-bo confirm``: a choice measured for real, by the run's own problem."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from map_bo.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from map_bo.loop.result import Choice, Result
    from map_bo.loop.verdict.confirm import Confirmation
    from map_bo.problems.problem import Problem
    from map_bo.workers.workers import Workers

__all__ = ["confirm", "confirm_options", "measure", "show", "with_values"]

_PARTS = ("problem", "workers")


def confirm_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``map-bo confirm`` besides those of a choice."""
    parser.add_argument(
        "--on",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="measure on other examples: a setting of the run's problem that is different, such "
        "as tasks.math.data=test.jsonl (repeatable; default: what loop.holdout has kept)",
    )
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def measure(options: argparse.Namespace, choice: Choice, result: Result) -> Confirmation:
    """Measure a choice on the examples of the search, and record that.

    Args:
        options: The options of the command.
        choice: The choice.
        result: The run, with its surrogate where that is available.
    """
    with _opened(options, []) as (problem, workers):
        run = replace(result, problem=problem, run_dir=Path(os.path.abspath(options.run)))
        return run.measure(choice, workers=workers).confirmed[-1]


def confirm(options: argparse.Namespace, choice: Choice, result: Result) -> None:
    """Measure a choice and all anchors on examples that the search never saw; show and record it.

    Args:
        options: The options of the command.
        choice: The choice.
        result: The run.
    """
    from map_bo.errors import SettingsError

    with _opened(options, options.on) as (problem, workers):
        run = replace(result, problem=problem, run_dir=Path(os.path.abspath(options.run)))
        if options.on and problem.metrics != run.metrics:
            raise SettingsError(
                "with these settings the problem has other metrics than the run",
                hint="give the same tasks with other examples",
            )
        found = run.confirm(choice, on=problem if options.on else None, workers=workers)
    show(found.confirmed[-1], as_json=options.json)


def show(found: Confirmation, *, as_json: bool = False) -> None:
    """Print a confirmation: a table of what was promised beside what is, and its verdict."""
    if as_json:
        sys.stdout.write(json.dumps(found.summary(), indent=2) + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    head, rows = found.table()
    table = Table(box=None)
    for j, title in enumerate(head):
        table.add_column(title, justify="right" if j else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for line in found.lines():
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _opened(
    options: argparse.Namespace, on: Sequence[str]
) -> Iterator[tuple[Problem, Workers | None]]:
    """Build the problem of a run, with other values where they are given, and open its workers."""
    from map_bo.app.build import build_problem, build_workers
    from map_bo.app.trust import recorded_configuration
    from map_bo.loop.driving.steps import closing_workers, open_workers
    from map_bo.loop.identity import problem_identity, refuse_another
    from map_bo.loop.reading import created_of

    run, values = os.path.abspath(options.run), _located(on)
    created = created_of(run)
    recorded = created.get("config")
    with recorded_configuration(run, recorded, trust=options.trust, parts=_PARTS) as config:
        config = with_values(config, values)
        problem = build_problem(config)
        if not values:  # the coefficients are worth nothing for other checkpoints
            now = json.loads(json.dumps(problem_identity(problem)))
            refuse_another({"problem": created["problem"]}, {"problem": now})
        settings = build_workers(config)
        if settings is None:
            yield problem, None
            return
        with closing_workers(open_workers(settings, problem)) as workers:
            yield problem, workers


def with_values(config: DictConfig, values: Sequence[str]) -> DictConfig:
    """Return a configuration whose problem has other values.

    Args:
        config: The configuration.
        values: As ``KEY=VALUE`` with keys below ``problem``.

    Raises:
        ConfigError: When one has no ``=``, or names no setting of the problem.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not values:
        return config
    tree: Any = OmegaConf.to_container(config, resolve=True)
    changed: Any = OmegaConf.create(tree)
    for text in values:
        key, sign, value = text.partition("=")
        key = key.removeprefix("problem.")
        if not sign or OmegaConf.select(changed, f"problem.{key.partition('.')[0]}") is None:
            raise ConfigError(
                f"--on {text!r} is not a setting of the run's problem",
                hint=f"write KEY=VALUE; its settings are {', '.join(map(str, tree['problem']))}",
            )
        try:
            given = OmegaConf.from_dotlist([f"problem.{key}={value}"])
            changed = OmegaConf.merge(changed, given)
        except OmegaConfBaseException as error:
            raise ConfigError(f"--on {text!r} cannot be set: {error}") from error
    assert isinstance(changed, DictConfig)
    return changed


def _located(values: Sequence[str]) -> list[str]:
    """Return values in which files of the current directory are named by their absolute paths."""
    found = []
    for text in values:
        key, sign, value = text.partition("=")
        here = bool(value) and os.path.exists(value)
        found.append(f"{key}{sign}{os.path.abspath(value) if here else value}")
    return found
