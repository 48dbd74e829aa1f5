"""What Hydra calls: a run, or a job of a sweep, which is skipped or resumed if it exists."""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from map_bo.app.worker_process import end_with_parent, exit_if_orphaned
from map_bo.errors import ConfigError, MapBoError
from map_bo.moved import current, with_current_targets
from map_bo.tracking.wandb.run import is_mirrored

if TYPE_CHECKING:
    from map_bo.loop.result import Result

__all__ = [
    "RENAMED",
    "UNNAMED",
    "Refused",
    "job_name",
    "record_of",
    "register_job_name",
    "run_job",
    "run_task",
    "warn_of_old_names",
]

logger = logging.getLogger(__name__)

_LONGEST = 80
_LOCAL, _WANDB = "map_bo.loop.mirrors.Local", "map_bo.tracking.wandb.mirror.Wandb"
UNNAMED = ("progress", "tracking", "drive", "workers")
"""Settings that a job's name omits: they show it, or say where it evaluates."""


def job_name(overrides: str) -> str:
    """Return the directory of a job, which depends on its own overrides alone.

    It is the overrides themselves where they can be a file name, so that a repeated sweep finds its
    jobs again, whatever their order and number. Characters that a file name cannot have are
    replaced; then, and for long names, a digest of the overrides keeps names distinct.

    Args:
        overrides: Sorted overrides, such as ``"seed=0,surrogate=gp"``.
    """
    if not overrides:
        return "defaults"
    clean = re.sub(r"[^\w.,=+@-]+", "_", overrides)
    if clean == overrides and len(clean) <= _LONGEST and clean.strip("."):
        return clean
    digest = hashlib.sha256(overrides.encode()).hexdigest()[:10]
    return f"{clean[:_LONGEST].strip('.')}-{digest}"


def register_job_name() -> None:
    """Register the names of jobs in the configuration, as ``${map_bo.job_name:OVERRIDES}``."""
    OmegaConf.register_new_resolver("map_bo.job_name", _name_of, replace=True)


def _name_of(overrides: Sequence[str]) -> str:
    """Return the name of the job with these overrides, in any order."""
    return job_name(",".join(sorted(text for text in overrides if _matters(text))))


def _matters(override: str) -> bool:
    """Return whether an override changes what a job finds."""
    group = re.split(r"[.@=]", override.lstrip("+~"), maxsplit=1)[0]
    return group not in UNNAMED


def record_of(hydra: Any) -> dict[str, Any]:
    """Return the choices of a run's command, as plain data to record with it.

    Args:
        hydra: Hydra's own configuration.
    """
    choices = {
        str(group): None if choice is None else str(choice)
        for group, choice in hydra.runtime.choices.items()
        if not str(group).startswith("hydra/")
    }
    return {"overrides": [str(text) for text in hydra.overrides.task], "choices": choices}


RENAMED: Mapping[tuple[str, str], str] = {
    ("experiment", "reference"): "published",
    ("experiment", "reference_kind_box"): "published_kind_box",
    ("sampler", "bins_reference"): "bins_published",
    ("sampler", "reference"): "published",
    ("surrogate", "reference"): "published",
}
"""Group and the name of an option in version 0.1 -> its name today."""


def warn_of_old_names(choices: Mapping[str, str | None]) -> None:
    """Warn of options that were chosen by the names that they had in version 0.1.

    Args:
        choices: Group -> the option that was chosen.
    """
    for (group, old), new in RENAMED.items():
        if choices.get(group) == old:
            logger.warning(
                "%s=%s is now %s=%s; the old name goes in version 0.3", group, old, group, new
            )


class Refused(BaseException):
    """A user's mistake on its way through Hydra, which prints the overrides of any `Exception`.

    Attributes:
        error: What is to be told.
    """

    def __init__(self, error: MapBoError) -> None:
        super().__init__(str(error))
        self.error = error


def run_task(config: DictConfig) -> float:
    """Make the run that ``config`` describes in Hydra's output directory.

    Returns:
        The hypervolume of the predicted front, which is the value of the job in a sweep.

    Raises:
        Refused: When the user made a mistake, and the run is not a job of a sweep.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # a user's own classes and functions are in the working directory
    warn_of_old_names(hydra.runtime.choices)
    directory, choices = Path(hydra.runtime.output_dir), record_of(hydra)
    if hydra.mode == RunMode.MULTIRUN:
        if not config.get("drive", True):
            raise ConfigError(
                "drive=false only creates a run, and this is a sweep of several",
                hint="create one run with `map-bo run drive=false ...`",
            )
        _group(config, Path(hydra.sweep.dir).name)
        end_with_parent()
        try:
            return run_job(config, directory, choices)
        except SystemExit:
            exit_if_orphaned()
            raise
    from map_bo.app.task import create, drive, is_told, show
    from map_bo.tracking.fresh import leaving_nothing, remove_hydra_files

    created_only = not config.get("drive", True) or is_told(config)
    try:
        with leaving_nothing(directory):
            if created_only:
                sys.stdout.write(create(config, directory, choices) + "\n")
                return nan
            result = drive(config, directory, fresh=True, choices=choices)
    except MapBoError as error:
        remove_hydra_files(directory)
        raise Refused(error) from error
    show(result, Path.cwd())
    return float(result.summary["hypervolume"]["predicted front"])


def _group(config: DictConfig, sweep: str) -> None:
    """Set the sweep as the group of trackers that group runs and have no group yet."""
    for node in (config.tracking or {}).values():
        if "group" in node and node.group is None:
            OmegaConf.update(node, "group", sweep)


def run_job(config: DictConfig, directory: Path, choices: Mapping[str, Any]) -> float:
    """Make one job of a sweep, or what is left of it.

    A finished job is read back and not repeated. A job that fails leaves its reason in its
    directory and does not stop the others.

    Args:
        config: The resolved configuration of the job.
        directory: The job's directory, see :func:`job_name`.
        choices: The choices of its command, see :func:`record_of`.

    Returns:
        The hypervolume of the predicted front; NaN when the job failed.
    """
    from map_bo.loop.reading import clear_failure, record_failure

    try:
        result = _result(config, directory, choices)
        clear_failure(directory)
        return float(result.summary["hypervolume"]["predicted front"])
    except MapBoError as error:
        sys.stderr.write(f"error: {directory.name}: {error.message}\n")
        if error.hint:
            sys.stderr.write(f"hint: {error.hint}\n")
        record_failure(directory, error)
    except Exception as error:
        logger.exception("%s failed", directory.name)
        record_failure(directory, error)
    return nan


def _result(config: DictConfig, directory: Path, choices: Mapping[str, Any]) -> Result:
    from map_bo.app.task import drive, show
    from map_bo.loop.growth import MAY_CHANGE
    from map_bo.loop.identity import refuse_another
    from map_bo.loop.reading import created_of, load_state
    from map_bo.loop.result import Result
    from map_bo.tracking.fresh import leaving_nothing
    from map_bo.tracking.jsonl import is_run

    if is_run(directory):
        recorded = (created_of(directory, extended=False).get("config") or {}).get("tree") or {}
        now: Any = OmegaConf.to_container(config, resolve=True)
        both = (_comparable(with_current_targets(tree)) for tree in (recorded, now))
        refuse_another(*both)
        in_force = (created_of(directory).get("config") or {}).get("tree") or {}
        for name in set(MAY_CHANGE) & set(in_force.get("loop") or {}):
            # A job that was extended by hand goes on as it is.
            OmegaConf.update(config, f"loop.{name}", in_force["loop"][name], merge=False)
        state, space = load_state(directory)
        if state.summary is not None and _is_shown(config, directory):
            sys.stdout.write(f"already finished: {directory.name}\n")
            return Result.of(state, space, run_dir=directory)
    fresh = not (directory / "events.jsonl").exists()
    with leaving_nothing(directory, fresh=fresh):
        result = drive(config, directory, fresh=fresh, choices=choices)
    show(result, Path.cwd())
    return result


def _is_shown(config: DictConfig, directory: Path) -> bool:
    """Return whether the trackers of a finished job have shown all of it."""
    nodes = config.tracking if "tracking" in config else {"local": {"_target_": _LOCAL}}
    for node in (nodes or {}).values():
        if node.get("_target_") == _LOCAL and not (directory / "report.html").exists():
            return False
        if node.get("_target_") == _WANDB and not is_mirrored(directory):
            return False
    return True


def _comparable(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide whether two jobs are the same; how they are shown does not.

    Classes that have moved since the job was recorded have their names of today.
    """

    def kept(node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        found = {key: kept(value) for key, value in node.items() if key != "progress"}
        if isinstance(found.get("_target_"), str):
            found["_target_"] = current(found["_target_"])
        return found

    found = {key: kept(value) for key, value in tree.items() if key not in UNNAMED}
    if isinstance(start := found.get("start_from"), Mapping) and not start.get("source"):
        found["start_from"] = None  # as jobs of version 0.1 have recorded it
    return found


# Launchers send the task to processes that load nothing else of this package and resolve the
# configuration again, so the resolver is registered wherever the task is loaded.
register_job_name()
