"""``map-bo merge``: writing the model of a point of a front, or of a recipe."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from map_bo.errors import ConfigError

__all__ = ["merge_choice", "merge_options", "merge_recipe", "recipe_at", "row_of"]


def merge_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``map-bo merge`` besides those of a choice."""
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to write (new)")
    parser.add_argument(
        "--row",
        type=int,
        metavar="N",
        help="merge with the coefficients of a row that `map-bo ask` has proposed",
    )
    parser.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="limit on the resident memory of the process, such as 2GB (default: some hundred MB)",
    )
    parser.add_argument(
        "--shard-size",
        metavar="SIZE",
        default="5GB",
        help="largest size of one weight file (default: %(default)s)",
    )
    parser.add_argument(
        "--code",
        action="store_true",
        help="carry the base's Python code, which loading with trust_remote_code runs",
    )
    parser.add_argument(
        "--lora-rank",
        type=int,
        metavar="R",
        help="write a LoRA adapter of at most this rank instead of a whole model; 0 is exact",
    )
    parser.add_argument(
        "--task",
        metavar="EXPERT",
        help="write the merge as a model of this expert's task, with its head and configuration",
    )


def row_of(run: str, options: argparse.Namespace) -> Any:
    """Return a row that was proposed as a choice, so that its model can be written.

    Args:
        run: The run's directory.
        options: The options of the command.

    Raises:
        ConfigError: When there is no such row, or a choice was given too.
    """
    import torch

    from map_bo.loop.reading import load_state
    from map_bo.loop.result import Choice

    if options.prefer or options.at_least or options.at_most or options.point is not None:
        raise ConfigError("--row and a choice were both given", hint="give one of them")
    state, space = load_state(run)
    if not 0 <= options.row < len(state.X):
        raise ConfigError(
            f"--row is {options.row}, and the run has proposed {len(state.X)} rows, counted from 0",
            hint="see those that wait with `map-bo ask RUN --waiting`",
        )
    unknown = torch.full((len(state.metrics),), torch.nan, dtype=torch.float64)
    outcome = state.outcomes.get(options.row)
    return Choice(
        point=options.row,
        x=state.X[options.row],
        mean=unknown,
        lower=unknown,
        upper=unknown,
        real=unknown if outcome is None else outcome.Y[0],
        corrected=unknown,
        metrics=state.metrics,
        space=space,
        notes=("point is the number of a proposed row, not of a point of the front",),
    )


def merge_choice(
    choice: Any, options: argparse.Namespace, config: Any, *, run: str, out: str
) -> str:
    """Write the model of a choice, and return a message about it.

    Args:
        choice: The choice, without its problem.
        options: The options of the command.
        config: The recorded configuration of the run, which the user trusts.
        run: Absolute path of the run's directory.
        out: Absolute path of the folder to write.
    """
    from map_bo.app.build import build_problem
    from map_bo.loop.identity import problem_identity, refuse_another
    from map_bo.loop.reading import created_of
    from map_bo.merging.export.model import ExportSettings
    from map_bo.nested.materialised import nested_exporter
    from map_bo.nested.reading import is_nested

    settings = ExportSettings(
        options.max_memory,
        options.shard_size,
        progress=True,
        task=options.task,
        code=options.code,
    )
    created = created_of(run)
    problem = build_problem(config)
    # The coefficients are worth nothing for other checkpoints than those of the run.
    now = json.loads(json.dumps(problem_identity(problem)))
    refuse_another({"problem": created["problem"]}, {"problem": now})
    exports = nested_exporter(problem, run) if is_nested(created) else None
    whole = replace(choice, problem=problem, exports=exports)
    if options.lora_rank is not None and options.task is not None:
        raise ConfigError(
            "--lora-rank and --task were both given, and an adapter has no task head",
            hint="give one of them",
        )
    if options.lora_rank is not None:
        written = whole.export_adapter(out, rank=options.lora_rank or None)
        return (
            f"adapter of rank {written.rank} written to {written.path}; its error is "
            f"{written.error:.2%} of the change (relative Frobenius norm)"
        )
    return f"merged model written to {whole.export(out, settings=settings)}"


def recipe_at(path: str) -> Path | None:
    """Return the recipe at a path, which is a file or the folder of a merged model."""
    file = Path(path)
    if file.is_dir() and not (file / "events.jsonl").exists():
        file = file / "recipe.yaml"
    return file if file.is_file() and file.suffix in (".yaml", ".yml") else None


def merge_recipe(recipe: Path, options: argparse.Namespace) -> str:
    """Merge by a recipe once more, and return a message about it.

    Raises:
        ConfigError: When a choice was given too, which a recipe does not need.
        MergeError: When an input is not the one that the recipe names.
    """
    from map_bo.operators.recipes import merge_again

    if options.prefer or options.at_least or options.at_most or options.point is not None:
        raise ConfigError(
            f"{recipe} is a recipe, and a preference, bound or point was given as well",
            hint="leave these out, or name a run to choose a point of its front",
        )
    if options.task is not None:
        raise ConfigError(
            "a recipe says itself which task's head the model has, and --task was given as well",
            hint="leave out --task, or name a run",
        )
    if options.lora_rank is not None:
        raise ConfigError(
            "a recipe cannot be written as an adapter", hint="leave out --lora-rank, or name a run"
        )
    written = merge_again(
        recipe,
        os.path.abspath(options.out),
        max_memory=options.max_memory,
        shard_size=options.shard_size,
        trust=options.trust,
        code=options.code,
    )
    return f"merged model written to {written}"
