"""Weights & Biases as a mirror of a run: online with a key, offline without one.

:class:`Wandb` holds the settings, :class:`WandbMirror` writes the events of a run, and
:class:`Background` runs the mirror in a thread of its own, so that it can neither stop nor slow the
run.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from map_bo.errors import ConfigError
from map_bo.foreign import read_json
from map_bo.tracking.store import Event
from map_bo.tracking.tracker import Tracker
from map_bo.tracking.wandb.numbers import Numbers, flat, front_table
from map_bo.tracking.wandb.run import STATE, has_key

if TYPE_CHECKING:
    import wandb

__all__ = ["Background", "Wandb", "WandbMirror", "default_mode"]

logger = logging.getLogger(__name__)

Mode = Literal["online", "offline", "disabled"]

_Item: TypeAlias = "Event | bool"  # a bool is the end: whether the run is whole

_SOON = 5.0
"""Seconds to wait for a tracker after an interruption: someone may be holding Ctrl-C."""

_WRITTEN = (
    "events.jsonl",
    "outcomes.bin",
    "evaluations.csv",
    "front.csv",
    "summary.json",
    "report.html",
    "run.log",
    ".hydra/*.yaml",
    "plots/*.png",
)
"""Files of a run directory in the artifact; merged models are left out."""


class Background:
    """Runs another tracker in a thread; a failure there is logged once, as a warning.

    The queue in between is bounded. A tracker that lags behind by the whole queue is taken to hang
    and is given up, as is one that fails: the record of the run is complete without it.

    Args:
        inner: The tracker, which only the thread uses.
        name: Its name in warnings.
        patience: Seconds to wait for it at the end of a run.
        room: Number of events that may wait in the queue.
    """

    def __init__(
        self, inner: Tracker, *, name: str, patience: float = 60.0, room: int = 10_000
    ) -> None:
        self._inner, self._name, self._patience = inner, name, patience
        self._queue: queue.Queue[_Item] = queue.Queue(room)
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)

    def observe(self, event: Event) -> None:
        """See :class:`Tracker`; it returns at once and raises nothing."""
        if self._thread.ident is None:
            self._thread.start()
        self._put(event)

    def finish(self, *, whole: bool) -> None:
        """Wait until the tracker has taken all events, but no longer than the patience."""
        if self._lost.is_set() or not self._thread.is_alive():
            return
        self._put(whole)
        self._thread.join(self._patience if whole else min(self._patience, _SOON))
        if self._thread.is_alive():
            self._give_up("it did not finish in time")

    def _put(self, item: _Item) -> None:
        if self._lost.is_set():
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._give_up(f"it lags behind by {self._queue.maxsize} events")

    def _work(self) -> None:
        try:
            while not self._lost.is_set():
                item = self._queue.get()
                if isinstance(item, bool):
                    self._inner.finish(whole=item)
                    return
                self._inner.observe(item)
        except BaseException as error:
            self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, reason: str) -> None:
        if not self._lost.is_set():
            self._lost.set()
            logger.warning(
                "%s is given up for this session; the run and its record go on: %s",
                self._name,
                reason,
            )


@dataclass(frozen=True)
class Wandb:
    """Settings of the mirror on Weights & Biases.

    Attributes:
        project: The project.
        entity: The user or team; ``None`` for the default of the key.
        group: Name that the runs of a sweep share; ``map-bo run -m`` sets it to the sweep's.
        job_type: The purpose of the run.
        name: Name of the run; ``None`` is the group's name and that of the run directory.
        tags: Tags of the run.
        mode: ``"online"``, ``"offline"`` or ``"disabled"``; ``None`` takes ``WANDB_MODE``, or else
            online when there is a key and offline when there is none.
        prefix: Prefix of the names of all logged numbers, such as ``"stage 1/"``.
        patience: Seconds to wait for the upload at the end of a run; data that are not uploaded by
            then stay on disk.
    """

    project: str = "map-bo"
    entity: str | None = None
    group: str | None = None
    job_type: str = "run"
    name: str | None = None
    tags: tuple[str, ...] = ()
    mode: Mode | None = None
    prefix: str = ""
    patience: float = 60.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tags", tuple(self.tags))
        if self.mode not in ("online", "offline", "disabled", None):
            raise ConfigError(
                f"the mode of wandb must be online, offline, disabled or null, got {self.mode!r}",
                hint="remove it to go online when there is a key and offline when there is none",
            )
        if not self.patience > 0:
            raise ConfigError(
                f"patience must be positive, got {self.patience}",
                hint="give the seconds to wait for the upload, such as 60",
            )

    def open(self, directory: Path | None) -> Tracker:
        """See :class:`map_bo.tracking.tracker.Tracking`; nothing is imported or written yet."""
        mirror = WandbMirror(self, None if directory is None else Path(directory))
        # wandb itself gives up after the patience; the rest is for its start and end.
        return Background(mirror, name="wandb", patience=self.patience + 15)


def default_mode(environment: Mapping[str, str]) -> Mode:
    """Return the default mode, by ``WANDB_MODE`` or by whether there is a key.

    Without a key, wandb would ask for one and wait; see :func:`map_bo.tracking.wandb.run.has_key`.
    """
    asked = environment.get("WANDB_MODE", "").lower()
    if asked in ("offline", "dryrun"):
        return "offline"
    if asked == "disabled":
        return "disabled"
    if asked in ("online", "run"):
        return "online"
    return "online" if has_key(environment) else "offline"


class WandbMirror:
    """Writes the events of a run to Weights & Biases. It may block and raise.

    The wandb run begins with the first event that no session has sent before. Its id is kept in
    ``wandb.json`` in the run directory, so that resuming a run also resumes its wandb run. The step
    of an event is its number in the record.

    Args:
        settings: Where and how.
        directory: The run's directory, or None for a run that is kept in memory.
    """

    def __init__(self, settings: Wandb, directory: Path | None) -> None:
        self._settings, self._directory = settings, directory
        self._numbers = Numbers()
        self._run: wandb.Run | None = None
        self._seen = 0
        self._state: dict[str, Any] = {"id": _new_id(), "events": 0, "whole": False}
        path = self._state_path()
        if path is not None:
            with suppress(OSError, ValueError, TypeError):
                self._state.update(read_json(path))

    def observe(self, event: Event) -> None:
        """See :class:`map_bo.tracking.tracker.Tracker`."""
        self._seen += 1
        numbers = self._numbers.of(event)
        if self._seen <= self._state["events"]:
            return
        run = self._open()
        if event.kind == "extended":
            config = _configuration(self._numbers.created)
            run.config.update(config, allow_val_change=True)  # type: ignore[no-untyped-call]
        if numbers:
            self._log(numbers)
        self._keep(events=self._seen, whole=False)

    def finish(self, *, whole: bool) -> None:
        """See :class:`map_bo.tracking.tracker.Tracker`; a whole run logs its front and files."""
        if self._run is None and (not whole or self._state["whole"] or not self._seen):
            return
        run = self._open()
        if whole:
            self._conclude(run)
        run.finish(exit_code=0 if whole else 1)
        self._keep(whole=whole)
        if run.settings.mode == "offline":
            logger.info("wandb: recorded offline; `wandb sync %s` uploads it", Path(run.dir).parent)
        elif run.url:
            logger.info("wandb: %s", run.url)

    def _open(self) -> wandb.Run:
        if self._run is not None:
            return self._run
        import wandb

        mode = self._settings.mode or default_mode(os.environ)
        wandb.setup(settings=wandb.Settings(silent=True))  # otherwise it prints greetings
        try:
            self._run = self._start(mode)
        except Exception as error:
            if mode != "online":
                raise
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            logger.warning(
                "wandb cannot go online and records offline; the run goes on: %s "
                "(check the network, or the key: `wandb login --relogin`)",
                reason,
            )
            # The failed attempt holds the run's id until all of wandb has ended.
            if wandb.run is None:
                wandb.teardown()
                wandb.setup(settings=wandb.Settings(silent=True))
            else:
                self._state["id"] = _new_id()
            self._run = self._start("offline")
        for kind in ("metric", "noise", "coefficient", "hypervolume"):
            self._run.define_metric(
                f"{self._settings.prefix}{kind}/*", step_metric=f"{self._settings.prefix}evaluation"
            )
        offline = self._run.settings.mode == "offline"
        self._keep(
            project=self._settings.project,
            entity=self._settings.entity or self._run.entity or None,
            group=self._settings.group,
            prefix=self._settings.prefix,
            mode=mode,
            offline=bool(self._state.get("offline")) or offline,
        )
        return self._run

    def _start(self, mode: Mode) -> wandb.Run:
        import wandb

        given, place = self._settings, self._directory
        name = given.name or "-".join(
            part for part in (given.group, place.name if place else None) if part
        )
        return wandb.init(
            project=given.project,
            entity=given.entity,
            group=given.group,
            job_type=given.job_type,
            name=name or None,
            tags=given.tags,
            mode=mode,
            id=self._state["id"],
            resume="allow",
            reinit="create_new",
            dir=os.environ.get("WANDB_DIR") or (None if place is None else str(place)),
            config=_configuration(self._numbers.created),
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                save_code=False,
                init_timeout=min(30.0, given.patience),
                finish_timeout=given.patience,
            ),
        )

    def _log(self, numbers: Mapping[str, Any], *, step: int | None = None) -> None:
        prefix = self._settings.prefix
        named = {f"{prefix}{name}": value for name, value in numbers.items()}
        self._open().log(named, step=self._seen if step is None else step)

    def _conclude(self, run: wandb.Run) -> None:
        import wandb

        numbers = self._numbers
        last: dict[str, Any] = {}
        if numbers.front is not None:
            columns, rows = front_table(numbers.front, numbers.names)
            table = last["front"] = wandb.Table(columns=[*columns], data=rows)
            if len(numbers.metrics) > 1:
                x, y = (f"predicted:{metric.name}" for metric in numbers.metrics[:2])
                last["front plot"] = wandb.plot.scatter(table, x, y, title="predicted front")
        if self._directory is not None:
            for path in sorted(self._directory.glob("plots/*.png")):
                last[f"plots/{path.stem}"] = wandb.Image(str(path))
        if last:
            self._log(last, step=self._seen + 1)
        for name, value in flat(numbers.summary).items():
            run.summary[f"{self._settings.prefix}{name}"] = value
        if self._directory is not None:
            artifact = wandb.Artifact(f"run-{self._state['id']}", type="map-bo-run")
            for pattern in _WRITTEN:
                for path in sorted(self._directory.glob(pattern)):
                    artifact.add_file(str(path), name=str(path.relative_to(self._directory)))
            run.log_artifact(artifact)

    def _state_path(self) -> Path | None:
        return None if self._directory is None else self._directory / STATE

    def _keep(self, **changes: Any) -> None:
        self._state.update(changes)
        path = self._state_path()
        if path is not None:
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps(self._state))
            temporary.replace(path)


def _new_id() -> str:
    return uuid.uuid4().hex[:8]


def _configuration(created: Mapping[str, Any]) -> dict[str, Any]:
    """Return the resolved configuration, with the choice of each group below ``choices``.

    The data of the ``created`` event are below ``run``.
    """
    given = created.get("config")
    config = given if isinstance(given, Mapping) else {}
    tree = config.get("tree", config)
    choices = {"choices": config["choices"]} if config.get("choices") else {}
    own = {name: value for name, value in created.items() if name != "config"}
    return {**(tree if isinstance(tree, Mapping) else {}), **choices, "run": own}
