from __future__ import annotations

import re
import time

import pytest

from map_bo.merging.adapters.patterns import ending_pattern, require_quick

MODULES = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(80) for p in "qkvo"]


@pytest.mark.parametrize(
    "text",
    [
        "q_proj",
        "^model.layers.0.self_attn.q_proj",
        r".*layers\.(1[0-9])\..*(q|v)_proj",
        r"(?:self_attn|mlp)\.(q_proj|k_proj|down_proj)",
        r"layers\.(0|1|2|10|11|12)\.self_attn\.[qkv]_proj",
        r"^(?!.*visual).*q_proj",
        r"layers\.\d+\.mlp",
        r"(q_proj)?",
        r"(layers\.)+q",
    ],
)
def test_what_adapters_have_is_taken(text: str) -> None:
    require_quick([text], MODULES)


@pytest.mark.parametrize(
    "text",
    [
        "(a+)+b",
        "([a-z._0-9]+)*!",
        "(.*.*)*x",
        "(a|a)*b",
        "(a|ab|b)+!",
        "((a?){20})*b",
        "(a{1,9}){1,9}b",
        r"(.+)\1+!",
        ".*" * 12 + "!",
        ".?" * 40 + "!",
        "(a|.)" * 40 + "!",
        "(?i)q_proj",
        "a" * 2000,
        "(?:(?:.*)*)*b",
        "(?P<x>.+)+!",
    ],
)
def test_what_could_take_for_ever_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"ways|repeats|back|characters"):
        require_quick([text], MODULES)


def test_what_is_taken_is_quick() -> None:
    slow = [r".*layers.*proj.*x", ".+a.+b", r"(?=.*q).*v"]
    require_quick(slow, MODULES)
    start = time.perf_counter()
    for text in slow:
        for name in MODULES:
            ending_pattern(text).match(name)
    assert time.perf_counter() - start < 1.5


def test_too_many_are_refused() -> None:
    with pytest.raises(ValueError, match="10001 expressions, and 10000 are the most"):
        require_quick((f"q{i}" for i in range(10_001)), [])


def test_an_end_is_matched_from_a_dot_on() -> None:
    assert ending_pattern("q").match("a.q")
    assert not ending_pattern("q").match("a.bq")
    with pytest.raises(re.error):
        ending_pattern("(")
