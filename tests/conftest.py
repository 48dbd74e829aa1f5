"""What every test shares: torch's threads, derandomised Hypothesis, a cache of its own."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# `tests.contracts` is imported by name, also when pytest is not started as `python -m pytest`.
ROOT = str(Path(__file__).parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

# One thread, so that tests can run beside each other; `make test-portable` tries two as well.
torch.set_num_threads(int(os.environ.get("MAP_BO_TEST_THREADS", "1")))

# A shell ignores interrupts for what it starts in the background, and so would the tests that send
# some, and the processes that these start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# `too_slow` measures the machine, which tests share with others, not the law under test.
settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give slow tests more time: a machine that does other work beside them is no failure."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(autouse=True)
def handlers_of_the_log() -> Iterator[None]:
    """Take away the handlers that a command run in this process gave the root logger.

    They write to streams of one test, which are closed when another one logs.
    """
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in [handler for handler in root.handlers if handler not in before]:
        root.removeHandler(handler)
        handler.close()  # a file that stays open is a warning, when it is collected
    root.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def zoo_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep trained experts in one folder of this session, never in the user's cache.

    Evaluations are not kept: a test that measures must not be given what another one measured.
    """
    folder = tmp_path_factory.mktemp("map_bo_cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAP_BO_CACHE", str(folder))
        patch.setenv("MAP_BO_EVALUATIONS", "off")
        yield folder
