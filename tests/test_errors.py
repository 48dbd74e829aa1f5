from __future__ import annotations

import pickle

import pytest

from map_bo import errors

FAMILY = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.MapBoError)
]


@pytest.mark.parametrize("kind", FAMILY)
def test_every_error_carries_message_and_hint_and_survives_pickling(
    kind: type[errors.MapBoError],
) -> None:
    error = kind("what is wrong", hint="what to do")
    assert isinstance(error, errors.MapBoError)
    assert str(error) == "what is wrong\nhint: what to do"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.message, again.hint) == (kind, "what is wrong", "what to do")


def test_a_hint_is_optional() -> None:
    assert str(errors.MapBoError("alone")) == "alone"


def test_a_reason_is_message_and_hint_on_one_line() -> None:
    assert errors.DataError("a is 2", hint="use 1").reason == "a is 2 (hint: use 1)"
    assert errors.DataError("a is 2").reason == "a is 2"
