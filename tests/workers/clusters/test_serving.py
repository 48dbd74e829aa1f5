from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator

import pytest
import torch

from map_bo.errors import ConfigError, SpaceError, WorkersError
from map_bo.workers.clusters.crew import Answer, Built, Missing, Refused
from map_bo.workers.clusters.serving import Order, build, evaluate, evaluate_or_build, forget
from map_bo.workers.inline import InlineWorkers
from map_bo.workers.workers import Outcome
from tests.workers.perils import Perils, task


def remote(problem: Perils | None = None) -> Order:
    """Return an order as from a driver elsewhere."""
    order = Order.of(Perils() if problem is None else problem)
    return dataclasses.replace(order, process=("elsewhere", 1))


@pytest.fixture
def order() -> Iterator[Order]:
    made = remote()
    assert isinstance(build(made), Built)
    yield made
    forget(made.token, made.driver)


def test_what_is_built_evaluates_as_the_drivers_own(order: Order) -> None:
    found = evaluate(order.token, order.driver, task(c=0.25))
    assert isinstance(found, Outcome)
    here = InlineWorkers(Perils()).submit(task(c=0.25)).result()
    assert torch.equal(found.observations.Y, here.observations.Y)


def test_a_task_that_is_sent_again_is_not_evaluated_again(order: Order) -> None:
    first = evaluate(order.token, order.driver, task())
    assert evaluate(order.token, order.driver, task()) is first
    assert evaluate(order.token, "another driver", task()) is not first
    assert evaluate(order.token, order.driver, task(row=1)) is not first
    assert evaluate(order.token, order.driver, task()) is not first  # only the last is kept


def test_a_process_that_has_not_built_it_says_so(order: Order) -> None:
    assert evaluate("something else", order.driver, task()) == Missing()


def test_the_same_problem_is_built_once_and_goes_with_the_last_driver(order: Order) -> None:
    other = dataclasses.replace(order, driver="other")
    build(other)
    forget(order.token, order.driver)
    assert isinstance(evaluate(order.token, "other", task()), Outcome)
    forget(order.token, "other")
    assert evaluate(order.token, "other", task()) == Missing()


def test_in_an_executor_the_latest_problem_takes_the_place_of_the_one_before(order: Order) -> None:
    other = remote(Perils(noise=0.3))
    assert other.token != order.token
    assert isinstance(evaluate_or_build(other, task()), Outcome)
    assert evaluate(order.token, order.driver, task()) == Missing()
    forget(other.token, other.driver)


def refusal(answer: Answer) -> str:
    assert isinstance(answer, Refused)
    return answer.error.message


def test_the_drivers_own_process_is_refused() -> None:
    assert "threads of the driver's own process" in refusal(build(Order.of(Perils())))


def test_another_problem_is_refused_by_its_digest() -> None:
    order = remote()
    other = dataclasses.replace(order, token="x", recipe=Order.of(Perils(noise=0.5)).recipe)
    assert "holds another problem than the driver: noise" in refusal(build(other))


def test_what_building_raises_is_an_answer() -> None:
    answer = build(remote(Perils(unbuildable=True)))
    assert refusal(answer) == "the problem cannot be built in a worker: OSError: no such weights"
    assert isinstance(answer, Refused)
    assert isinstance(answer.error, WorkersError)


def test_a_point_outside_the_space_ends_the_run(order: Order) -> None:
    wrong = dataclasses.replace(task(), x=(0.0, 0.0, 0.0))
    answer = evaluate(order.token, order.driver, wrong)
    assert isinstance(answer, Refused)
    assert isinstance(answer.error, SpaceError)


def test_where_no_signal_can_interrupt_it_what_comes_late_is_failed(order: Order) -> None:
    found: list[Answer] = []
    late = task("slow", timeout=0.5)
    thread = threading.Thread(
        target=lambda: found.append(evaluate(order.token, order.driver, late))
    )
    thread.start()
    thread.join()
    assert isinstance(found[0], Outcome)
    assert found[0].observations.failures == ("it took longer than 0.5 s",)


def test_in_the_main_thread_a_time_limit_interrupts_the_evaluation(order: Order) -> None:
    found = evaluate(order.token, order.driver, task("hang", timeout=0.2))
    assert isinstance(found, Outcome)
    assert found.observations.failures == ("it took longer than 0.2 s",)


def test_what_cannot_travel_is_refused_with_the_fix() -> None:
    class Local(Perils):
        pass

    with pytest.raises(ConfigError, match="Local") as raised:
        Order.of(Local())
    assert "module" in str(raised.value.hint)
