from __future__ import annotations

import pytest

from map_bo.errors import ConfigError
from map_bo.workers.processes import Processes
from map_bo.workers.reading import read_workers


def test_a_number_means_processes_and_settings_stay() -> None:
    assert read_workers(3) == Processes(3)
    settings = Processes(2, threads=1)
    assert read_workers(settings) is settings


@pytest.mark.parametrize("given", [None, 0, "0"])
def test_nothing_means_the_driver_s_own_process(given: object) -> None:
    if given == "0":
        with pytest.raises(ConfigError, match="got '0'"):
            read_workers(given)
        return
    assert read_workers(given) is None


@pytest.mark.parametrize("given", [-1, 2.5, "four", True, object(), {"count": 2}])
def test_what_is_no_workers_is_refused(given: object) -> None:
    with pytest.raises(ConfigError, match="workers must be"):
        read_workers(given)
