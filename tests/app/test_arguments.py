from __future__ import annotations

import pytest

from map_bo.app.arguments import (
    require_distinct_jobs,
    surrogate_of_sampler,
    with_added_key,
    with_workers,
)
from map_bo.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("sampler.surrogate=gp", "sampler/surrogate=gp"),
        ("sampler.surrogate=quadratic,gp", "sampler/surrogate=quadratic,gp"),
        ("sampler.surrogate=null,gp", "sampler/surrogate=null,gp"),
        ("sampler.surrogate=null", "sampler.surrogate=null"),
        ("sampler.surrogate={_target_: a.B}", "sampler.surrogate={_target_: a.B}"),
        ("sampler.surrogate=", "sampler.surrogate="),
        ("sampler.surrogate.link=identity", "sampler.surrogate.link=identity"),
        ("sampler=ucb", "sampler=ucb"),
        ("surrogate=gp", "surrogate=gp"),
        ("-m", "-m"),
    ],
)
def test_the_surrogate_of_a_sampler_is_chosen_by_name(given: str, taken: str) -> None:
    assert surrogate_of_sampler(given) == taken


@pytest.mark.parametrize(
    ("key", "added"),
    [
        ("problem.tasks.film.batch_size", True),
        ("problem.experts.math", True),
        ("problem.heads.film", True),
        ("loop.bugdet", False),
        ("problem.taskss.film", False),
    ],
)
def test_keys_of_the_users_own_mappings_need_no_plus(key: str, added: bool) -> None:
    given = ["seed=1", f"{key}=8", f"{key}_more=9"]
    found = with_added_key(given, f"Could not override '{key}'.\nTo append ...")
    assert found == (["seed=1", f"++{key}=8", f"{key}_more=9"] if added else None)
    assert with_added_key(found or given, f"Could not override '{key}'.") is None
    assert with_added_key(given, "something else") is None


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("workers=4", ["workers=processes", "workers.count=4"]),
        ("workers=1,4", ["workers=processes", "workers.count=1,4"]),
        ("workers=-1", ["workers=processes", "workers.count=-1"]),
        ("workers=2.5", ["workers=processes", "workers.count=2.5"]),
        ("workers=0", ["workers=inline"]),
        ("workers=ray", ["workers=ray"]),
        ("workers.count=4", ["workers.count=4"]),
        ("seed=4", ["seed=4"]),
    ],
)
def test_a_number_of_workers_is_so_many_processes(given: str, taken: list[str]) -> None:
    assert with_workers([given]) == taken


@pytest.mark.parametrize(
    "given", ["workers=1,2", "workers.count=range(1,3)", "tracking=local,wandb"]
)
def test_a_sweep_over_what_no_job_is_named_by_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="would share one directory") as caught:
        require_distinct_jobs(["-m", "seed=0,1", given], ("workers", "tracking"))
    assert given in str(caught.value)
    require_distinct_jobs(["-m", given, "hydra.sweep.subdir=${hydra.job.num}"], ("workers",))
    require_distinct_jobs([given], ("workers", "tracking"))


@pytest.mark.parametrize(
    "given", ["workers=2", "tracking=[local,wandb]", "seed=0,1", "workers=[", "-c"]
)
def test_other_sweeps_are_not_refused(given: str) -> None:
    require_distinct_jobs(["-m", given], ("workers", "tracking"))
