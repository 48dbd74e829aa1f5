"""Runs that grow: which settings may change once a run has begun, and what that does to it.

A change is an event of its own (``extended``, :mod:`map_bo.tracking.extension`), so the record
tells which settings were in force when. Where the search had ended and its budget grows, the front
is set back, and what was measured at its points counts as part of the search: nothing that was
paid for is lost, and nothing is paid for twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from map_bo.data import Front, Observations
from map_bo.errors import AnotherRunError, BudgetError, ConfigError, did_you_mean
from map_bo.loop.settings import Settings
from map_bo.plain import identity_of, modernise
from map_bo.report.run.artifacts import remove_report
from map_bo.tracking.extension import with_extension
from map_bo.tracking.jsonl import JsonlStore
from map_bo.tracking.store import Event, RunStore

__all__ = [
    "MAY_CHANGE",
    "Standing",
    "adopt",
    "changed_settings",
    "created_in_force",
    "extension",
    "is_over",
    "keep_grown_budget",
    "notes_on_extensions",
    "recorded_as",
    "refuse_nested_changes",
    "refuse_unchangeable",
    "remove_old_report",
    "with_changes",
    "with_defaults",
    "with_resampling",
]

_ALL = (
    "budget",
    "verify",
    "verify_extra",
    "batch",
    "retries",
    "timeout",
    "max_failure_share",
    "workers",
    "asynchronous",
)
MAY_CHANGE = tuple(each.name for each in dataclasses.fields(Settings) if each.name in _ALL)
"""Settings that may change on a run: none of them changes what a past evaluation means."""

_NOT_RECORDED = ("workers", "asynchronous")  # who evaluates, and when, is no part of the run

_OF_NESTED = ("retries", "timeout", "max_failure_share", "workers", "asynchronous")


def changed_settings(
    recorded: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return which of the settings that may change differ: name -> ``from`` and ``to``.

    Args:
        recorded: Settings in force, as plain data; those that their version did not know have
            today's defaults.
        now: Today's settings (:func:`map_bo.plain.identity_of`).
    """
    before = modernise(with_defaults(recorded, now), now)
    if not isinstance(before, Mapping):
        return {}
    return {
        name: {"from": before.get(name), "to": now[name]}
        for name in MAY_CHANGE
        if name not in _NOT_RECORDED and name in now and before.get(name) != now[name]
    }


def with_changes(
    recorded: Mapping[str, Any], changes: Mapping[str, Mapping[str, Any]]
) -> Mapping[str, Any]:
    """Return what is recorded of a run's start with these settings changed."""
    if not changes:
        return recorded
    return with_extension(recorded, {"settings": changes, "config": {}, "reopens": False})


def created_in_force(events: Iterable[Event]) -> dict[str, Any] | None:
    """Return the data of ``created`` with the settings in force; None without that event.

    Raises:
        StoreError: When an extension of the run is not of its form.
    """
    created: dict[str, Any] | None = None
    for event in events:
        if event.kind == "created" and created is None:
            created = dict(event.data)
        elif event.kind == "extended" and created is not None:
            created = with_extension(created, event.data)
    return created


def recorded_as(
    created: Mapping[str, Any], identity: Mapping[str, Any]
) -> tuple[Mapping[str, Any], bool]:
    """Return what is recorded of a run as it would be with the settings of ``identity``.

    Only those that may change are taken from there, so the rest can be compared.

    Args:
        created: What is recorded of its start, with the settings in force.
        identity: What makes the run that is opened the same run.

    Returns:
        That record, and whether a setting changes.
    """
    changes = changed_settings(created.get("settings", {}), identity["settings"])
    return with_changes(created, changes), bool(changes)


def is_over(events: Iterable[Event]) -> bool:
    """Return whether a run has finished and was not extended afterwards."""
    over = False
    for event in events:
        if event.kind == "finished":
            over = True
        elif event.kind == "extended" and event.data.get("reopens"):
            over = False
    return over


def keep_grown_budget(settings: Settings, state: Standing) -> Settings:
    """Return the settings, with the budget in force where they have one that was extended since.

    So a script, or one of several workers, that still names the budget with which the run was
    started does not take back what was added in the meantime.

    Args:
        settings: Those that a run is opened with.
        state: Where the run stands.
    """
    changes = [change["settings"].get("budget") for change in state.extensions]
    before = {change["from"] for change in changes if change is not None}
    now = state.created["settings"].get("budget")
    if not isinstance(now, int) or settings.budget not in before or settings.budget >= now:
        return settings
    return dataclasses.replace(settings, budget=now)


class Standing(Protocol):
    """Where a run stands, as far as it decides what a change does to it; see `RunState`."""

    @property
    def committed(self) -> int:
        """How many full evaluations the search has made or waits for."""
        ...

    @property
    def created(self) -> Mapping[str, Any]:
        """What is recorded of its start, with the settings in force."""
        ...

    @property
    def front(self) -> Front | None:
        """The front, once it has been solved."""
        ...

    @property
    def verified(self) -> Mapping[int, Observations]:
        """Row of the front -> its outcome."""
        ...

    @property
    def extensions(self) -> tuple[Mapping[str, Any], ...]:
        """What its extensions so far hold."""
        ...

    @property
    def stopped(self) -> str | None:
        """Why the search has stopped early."""
        ...


def extension(
    settings: Settings, state: Standing, config: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """Return the data of the event that extends a run to other settings.

    Args:
        settings: The settings from now on; only those of :data:`MAY_CHANGE` may differ.
        state: Where the run stands.
        config: Changes of the recorded configuration: key -> ``from`` and ``to``.

    Returns:
        None where nothing changes.

    Raises:
        BudgetError: When less is left for the search than what has been paid for.
    """
    alike = dataclasses.replace(settings, workers=None, asynchronous=None)
    changes = changed_settings(state.created["settings"], identity_of(alike)["fields"])
    config = dict(config or {})
    if not changes and not config:
        return None
    old = {name: change["from"] for name, change in changes.items() if name in _SIZES}
    reopens = False
    if old:
        before = _sizes({**{name: getattr(settings, name) for name in _SIZES}, **old})
        now = settings.search, settings.verifications
        if before != now:
            if settings.search < state.committed + len(state.verified):
                raise _too_small(settings, state.committed, len(state.verified))
            reopens = state.front is not None or (bool(state.stopped) and now[0] > before[0])
    return {"settings": changes, "config": config, "reopens": reopens}


def remove_old_report(data: Mapping[str, Any], store: RunStore) -> None:
    """Remove the files for people where an extension sets the front back.

    It is done before the event is recorded, so that there is never an old summary of a record
    that goes on.

    Args:
        data: What the event ``extended`` will hold.
        store: The store of the run.
    """
    if data["reopens"] and isinstance(store, JsonlStore):
        remove_report(store.directory)


_SIZES = ("budget", "verify", "verify_extra")


def _sizes(values: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many evaluations the search and the verification had by recorded settings."""
    budget, verify = int(values["budget"]), values["verify"]
    count = min(8, budget // 10) if verify is None else int(verify)
    return (budget if values["verify_extra"] else budget - count), count


def _too_small(settings: Settings, proposed: int, verified: int) -> BudgetError:
    paid, least = proposed + verified, proposed + verified
    values: dict[str, Any] = {name: getattr(settings, name) for name in _SIZES}
    while _sizes({**values, "budget": least})[0] < paid:
        least += 1
    what = f"{proposed} of the search" + (f" and {verified} of front points" if verified else "")
    left = f" ({settings.search} of them for the search)" if settings.verifications else ""
    return BudgetError(
        f"the budget of this run cannot be {settings.budget} evaluations{left}: {paid} have been "
        f"made or are waiting, {what}",
        hint=f"with these settings the budget must be at least {least}",
    )


def adopt(settings: Settings, data: Mapping[str, Any]) -> Settings:
    """Return the settings of a handle after another has extended the run.

    Workers stay those of the handle, because they belong to its process.

    Args:
        settings: The settings of the handle.
        data: What the event ``extended`` holds.
    """
    changes = {name: change["to"] for name, change in data["settings"].items()}
    plain = {
        name: value
        for name, value in changes.items()
        if name in MAY_CHANGE and name not in _NOT_RECORDED and getattr(settings, name) != value
    }
    return dataclasses.replace(settings, **plain) if plain else settings


def refuse_unchangeable(names: Iterable[str]) -> None:
    """Refuse settings that may not change on a run.

    Raises:
        ConfigError: On the first that may not, or that does not exist.
    """
    known = [each.name for each in dataclasses.fields(Settings)]
    for name in names:
        if name not in known:
            raise ConfigError(f"there is no setting {name!r}", hint=did_you_mean(name, known))
        if name not in MAY_CHANGE:
            raise ConfigError(
                f"{name} cannot change on a run",
                hint=f"{', '.join(MAY_CHANGE)} may; start a new run for anything else",
            )


def refuse_nested_changes(changes: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse changes that a nested run cannot take.

    Its budget and its verification were shared out among the nodes of its tree, each of which
    merges what the nodes below it have promoted; more evaluations below would change the problem
    of every node above.

    Raises:
        AnotherRunError: On the first of them.
    """
    for name, change in changes.items():
        if name not in _OF_NESTED:
            allowed = [one for one in _OF_NESTED if one in MAY_CHANGE]
            raise AnotherRunError(
                f"{name} of a nested run cannot change: it was {change['from']!r} and is "
                f"{change['to']!r}",
                hint="its nodes have shared out the budget and rest on each other: start a new "
                f"run; of a nested run {', '.join(allowed)} may change",
            )


def notes_on_extensions(extensions: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the summary says of a run that was extended."""
    notes = []
    for data in extensions:
        told = [
            f"{name} from {_said(change['from'])} to {_said(change['to'])}"
            for name, change in data["settings"].items()
        ]
        if told:
            notes.append(f"the run was extended: {', '.join(told)}")
    return notes


def _said(value: Any) -> str:
    return "null" if value is None else str(value)


def with_defaults(recorded: Any, now: Mapping[str, Any]) -> Any:
    """Return recorded settings with the defaults of those that their version did not know."""
    if not isinstance(recorded, Mapping):
        return recorded
    simple = {
        each.name: identity_of(each.default)
        for each in dataclasses.fields(Settings)
        if each.name in now and each.default is not dataclasses.MISSING
    }
    return {**simple, **recorded}


def with_resampling(recorded: Any, now: Any) -> Any:
    """Return the description of a problem with what version 0.1 left out of its metrics.

    That a metric draws new examples was recorded with the run's own metrics, and is compared there.
    """
    if not isinstance(recorded, Mapping) or not isinstance(now, Mapping):
        return recorded
    ours, theirs = now.get("metrics"), recorded.get("metrics")
    if not isinstance(ours, list) or not isinstance(theirs, list) or len(ours) != len(theirs):
        return recorded
    both = zip(ours, theirs, strict=True)
    return {
        **recorded,
        "metrics": [{"resampling": a.get("resampling"), **modernise(b, a)} for a, b in both],
    }
