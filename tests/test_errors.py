from __future__ import annotations

import pickle
import sys
from collections.abc import Iterable
from importlib import import_module

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


@pytest.mark.parametrize(
    ("home", "package"),
    [
        ("map_bo.samplers.baselines.cma:CMAES", "cma"),
        ("map_bo.samplers.baselines.evolutionary:NSGA2Sampler", "pymoo"),
        ("map_bo.samplers.baselines.evolutionary:NSGA3Sampler", "pymoo"),
        ("map_bo.pareto.evolution:NSGA2", "pymoo"),
        ("map_bo.pareto.evolution:NSGA3", "pymoo"),
    ],
)
def test_what_an_option_needs_is_named_when_its_settings_are_made(
    home: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, name = home.partition(":")
    monkeypatch.setitem(sys.modules, package, None)
    settings = vars(import_module(module))[name]
    with pytest.raises(errors.MissingDependencyError, match=f"needs {package}") as caught:
        settings()
    assert caught.value.hint == 'pip install "map-bo[baselines]"'


def test_a_reason_is_message_and_hint_on_one_line() -> None:
    assert errors.DataError("a is 2", hint="use 1").reason == "a is 2 (hint: use 1)"
    assert errors.DataError("a is 2").reason == "a is 2"


@pytest.mark.parametrize(
    ("word", "known", "before", "hint"),
    [
        ("smapler", ["seed", "sampler"], "", "did you mean 'sampler'?"),
        ("anchor", ["anchors"], "sampler.", "did you mean 'sampler.anchors'?"),
        ("x", ["seed", "sampler"], "", "choose from seed, sampler"),
        ("x", {"anchors": 1}, "sampler.", "choose from sampler.anchors"),
        (3, ("a",), "", "choose from a"),
        (None, [], "", "there are none"),
    ],
)
def test_a_hint_names_what_was_meant_or_what_there_is(
    word: object, known: Iterable[str], before: str, hint: str
) -> None:
    assert errors.did_you_mean(word, known, before=before) == hint
