from __future__ import annotations

from typing import Any

import pytest

from map_bo.errors import ConfigError, EvaluationError
from map_bo.evaluators.language.grading import Grading, texts_of

pytest.importorskip("transformers")


def says(texts: list[str], targets: list[Any], **settings: Any) -> list[float]:
    grading = Grading(**settings)
    return [grading.score(text, target) for text, target in zip(texts, targets, strict=True)]


def test_answers_are_compared() -> None:
    assert says([" yes \n", "Yes", "no"], ["yes"] * 3) == [1, 0, 0]
    assert says(["YES"], ["yes"], ignore_case=True) == [1]
    assert says(["Yes."], ["yes"], ignore_case=True, ignore_punctuation=True) == [1]
    assert says(["42", "4", "b"], [42, 42, ["a", "b"]]) == [1, 0, 1]


def test_a_pattern_finds_the_answer() -> None:
    text = "first 12, then the answer is 34 and 56"
    assert says([text], ["12"], pattern=r"\d+") == [1]
    assert says([text], ["56"], pattern=r"\d+", which="last") == [1]
    assert says([text], ["34"], pattern=r"answer is (\d+)") == [1]
    assert says(["nothing"], [""], pattern=r"\d+") == [0]
    assert says(["b"], ["None"], pattern=r"(a)|b") == [0]


def test_a_pattern_that_does_not_end_is_stopped() -> None:
    with pytest.raises(EvaluationError, match=r"longer than 0\.1 s on a text of 41 characters"):
        says(["a" * 40 + "b"], ["x"], pattern=r"(a|a|aa)+$", pattern_seconds=0.1)


def test_a_grader_says_how_right_an_answer_is() -> None:
    heard: list[tuple[str, object]] = []

    def half(answer: str, target: object) -> float:
        heard.append((answer, target))
        return 0.5

    assert says(["so 7"], [{"any": "thing"}], grader=half, pattern=r"\d") == [0.5]
    assert heard == [("7", {"any": "thing"})]
    for wrong in (1.5, -1, float("nan"), "good", None):
        with pytest.raises(EvaluationError, match=r"the grader returned .* for the answer 'a'"):
            says(["a"], ["b"], grader=lambda answer, target, wrong=wrong: wrong)


def test_targets_are_texts_numbers_or_lists_of_them() -> None:
    assert texts_of("a") == ["a"]
    assert texts_of(4) == ["4"]
    assert texts_of(["a", 4]) == ["a", "4"]
    assert texts_of({"a": 1}) == texts_of(None) == texts_of([["a"]]) == []


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"pattern": "(a"}, "not a regular expression"),
        ({"pattern": 3}, "not a regular expression"),
        ({"which": "second"}, "which must be one of first, last"),
        ({"pattern_seconds": 0}, "pattern_seconds must be"),
        ({"ignore_case": "no"}, "ignore_case must be true or false"),
        ({"grader": "nowhere"}, "grader must be a function"),
    ],
)
def test_settings_that_are_not_possible_are_refused(settings: Any, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        Grading(**settings)
