from __future__ import annotations

import pytest

from map_bo.app.arguments import surrogate_of_sampler


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
