"""The job that Hydra calls: one run, from a resolved configuration to a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

__all__ = ["drive", "run_task"]


def run_task(config: DictConfig) -> float:
    """Do the run that ``config`` describes in Hydra's output directory.

    Returns:
        The hypervolume of the predicted front, as the value of the job in a sweep.
    """
    from hydra.core.hydra_config import HydraConfig

    directory = Path(HydraConfig.get().runtime.output_dir)
    result = drive(config, directory, fresh=True)
    return float(result.summary["hypervolume"]["predicted front"])


def drive(
    config: DictConfig, directory: Path, *, fresh: bool = False, retry_failed: bool = False
) -> Any:
    """Start (``fresh``) or go on with the run in ``directory``, and print its summary."""
    from rich.console import Console

    from map_bo.app.build import build_problem, build_settings
    from map_bo.loop.progress import RichProgress, silent
    from map_bo.loop.publish import publish, view_of
    from map_bo.loop.run import Run
    from map_bo.report.cards import print_summary
    from map_bo.tracking.jsonl import JsonlStore

    settings = build_settings(config)
    store = JsonlStore.create(directory) if fresh else JsonlStore.open(directory)
    plain = {"tree": OmegaConf.to_container(config, resolve=True), "cwd": str(Path.cwd())}
    with store.lock():
        problem = build_problem(config)
        run = Run(problem, settings, store, config=plain)
        if retry_failed:
            run.reopen_failures()
        result = run.drive(RichProgress() if config.progress else silent)
        publish(result)
    console = Console()
    print_summary(view_of(result), console)
    _print_next_steps(console, result)
    return result


def _print_next_steps(console: Any, result: Any) -> None:
    from map_bo.loop.result import Exportable

    directory = _shown(result.run_dir)
    first = result.metrics[0].name
    console.print("\n[bold]Written[/bold]", highlight=False)
    for name in ("report.html", "front.csv", "evaluations.csv", "summary.json", "plots"):
        if (result.run_dir / name).exists():
            console.print(f"  {directory}/{name}", highlight=False, soft_wrap=True, markup=False)
    console.print("\n[bold]Next[/bold]", highlight=False)
    commands = [f"map-bo choose {directory} --prefer {first}=2"]
    if isinstance(result.problem, Exportable):
        commands.append(f"map-bo merge {directory} --prefer {first}=2 --out merged")
    for command in commands:
        console.print(f"  {command}", highlight=False, soft_wrap=True, markup=False)


def _shown(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
