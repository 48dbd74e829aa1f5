"""``map-bo merge``: the model of a point of a front, or of a recipe, written to disk."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from map_bo.errors import ConfigError

__all__ = ["merge_choice", "merge_options", "merge_recipe", "recipe_at"]


def merge_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``map-bo merge`` takes besides a choice."""
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to write (new)")
    parser.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="resident memory that the process may have, such as 2GB (default: some hundred MB)",
    )
    parser.add_argument(
        "--shard-size",
        metavar="SIZE",
        default="5GB",
        help="largest size of one weight file (default: %(default)s)",
    )
    parser.add_argument(
        "--lora-rank",
        type=int,
        metavar="R",
        help="write a LoRA adapter of at most this rank in place of a whole model; 0 is exact",
    )


def merge_choice(choice: Any, options: argparse.Namespace, config: Any, cwd: str | None) -> str:
    """Write the model of a choice; return what to tell of it.

    Args:
        choice: The choice, without its problem.
        options: What the command was given.
        config: The recorded configuration of the run.
        cwd: Where the run was started.
    """
    from map_bo.app.build import build_problem, working_directory
    from map_bo.loop.reading import created_of
    from map_bo.loop.state import problem_identity, refuse_another
    from map_bo.merging.export.model import ExportSettings
    from map_bo.nested.materialised import nested_exporter
    from map_bo.nested.reading import is_nested

    settings = ExportSettings(options.max_memory, options.shard_size, progress=True)
    out = os.path.abspath(options.out)
    created = created_of(options.run)
    with working_directory(cwd):
        problem = build_problem(config)
        # The coefficients are worth nothing for other checkpoints than those of the run.
        now = json.loads(json.dumps(problem_identity(problem)))
        refuse_another({"problem": created["problem"]}, {"problem": now})
        exports = nested_exporter(problem, options.run) if is_nested(created) else None
        whole = replace(choice, problem=problem, exports=exports)
        if options.lora_rank is not None:
            written = whole.export_adapter(out, rank=options.lora_rank or None)
            return (
                f"adapter of rank {written.rank} written to {written.path}; it leaves out "
                f"{written.error:.2%} of the change (relative Frobenius norm)"
            )
        return f"merged model written to {whole.export(out, settings=settings)}"


def recipe_at(path: str) -> Path | None:
    """Return the recipe that a path names: a file, or in the folder of a merged model."""
    file = Path(path)
    if file.is_dir() and not (file / "events.jsonl").exists():
        file = file / "recipe.yaml"
    return file if file.is_file() and file.suffix in (".yaml", ".yml") else None


def merge_recipe(recipe: Path, options: argparse.Namespace) -> str:
    """Merge once more what a recipe says; return what to tell of it.

    Raises:
        ConfigError: When a choice was asked for too: a recipe is one.
        MergeError: When an input is not the one that the recipe names.
    """
    from map_bo.operators.recipes import merge_again

    if options.prefer or options.at_least or options.at_most or options.point is not None:
        raise ConfigError(
            f"{recipe} is a recipe, which leaves nothing to choose",
            hint="name a run to choose a point of its front",
        )
    if options.lora_rank is not None:
        raise ConfigError(
            "a recipe is written as a whole model", hint="leave out --lora-rank, or name a run"
        )
    written = merge_again(
        recipe,
        os.path.abspath(options.out),
        max_memory=options.max_memory,
        shard_size=options.shard_size,
        trust=options.trust,
    )
    return f"merged model written to {written}"
