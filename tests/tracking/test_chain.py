from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from map_bo.errors import StoreError
from map_bo.loop.run import Run
from map_bo.tracking.chain import Link, is_whole, seal, verify
from map_bo.tracking.codec import encode_line
from map_bo.tracking.jsonl import MemoryStore
from map_bo.tracking.store import Event
from tests.loop.bowls import Bowls, quick
from tests.unsealed import unsealed


@functools.cache
def record(old: int = 0) -> tuple[bytes, ...]:
    """Return the lines of a real run, of which version 0.1 wrote the first few."""
    store = MemoryStore()
    run = Run(Bowls(), quick(8), store)
    for index in run.ask(3):
        run.tell(
            index, run.problem.evaluate(run.state.X[index : index + 1], generator=run.generator)
        )
    lines: list[bytes] = []
    link = Link()
    for number, event in enumerate(store.read()):
        line, after = encode_line(event, link)
        line = unsealed(line) if number < old else line
        link = verify(line, link) if number < old else after
        lines.append(line)
    return tuple(lines)


def whole(lines: tuple[bytes, ...]) -> int:
    """Return how many of the lines are as they were written."""
    link = Link()
    for number, line in enumerate(lines):
        try:
            link = verify(line, link)
        except StoreError:
            return number
    return len(lines)


@pytest.mark.parametrize("old", [0, 2])
def test_a_record_is_whole_as_it_was_written(old: int) -> None:
    lines = record(old)
    assert len(lines) == 5
    assert whole(lines) == 5


@settings(max_examples=200)
@given(data=st.data(), old=st.sampled_from([0, 2]))
def test_a_flipped_bit_is_seen_in_its_line_or_in_the_first_with_a_checksum(
    data: st.DataObject, old: int
) -> None:
    lines = list(record(old))
    row = data.draw(st.integers(0, len(lines) - 1))
    at = data.draw(st.integers(0, len(lines[row]) - 2))  # its newline is not the line's own
    changed = bytearray(lines[row])
    changed[at] ^= 1 << data.draw(st.integers(0, 7))
    lines[row] = bytes(changed)
    assert whole(tuple(lines)) in ({row} if row >= old else {row, old})


@given(data=st.data(), old=st.sampled_from([0, 2]))
def test_a_line_that_is_deleted_doubled_moved_or_replaced_is_seen(
    data: st.DataObject, old: int
) -> None:
    lines = list(record(old))
    one, two = sorted(data.draw(st.tuples(*[st.integers(0, 4)] * 2).filter(lambda x: x[0] != x[1])))
    changed = {
        "deleted": lines[:one] + lines[one + 1 :],
        "doubled": [*lines[:two], lines[one], *lines[two:]],
        "moved": [*lines[:one], lines[two], *lines[one + 1 : two], lines[one], *lines[two + 1 :]],
        "replaced": [*lines[:one], lines[two], *lines[one + 1 :]],
    }
    for how, damaged in changed.items():
        assert whole(tuple(damaged)) < len(damaged), how


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ((0, 2), "it was written as line 3: line 2 is missing before it"),
        ((0, 3), "it was written as line 4: lines 2 to 3 are missing before it"),
        ((0, 1, 0), "it is line 1 of the record once more: doubled, or moved"),
    ],
)
def test_what_happened_to_a_line_is_said(order: tuple[int, ...], said: str) -> None:
    link = Link()
    for row in order[:-1]:
        link = verify(record()[row], link)
    with pytest.raises(StoreError) as caught:
        verify(record()[order[-1]], link)
    assert caught.value.message == said


def test_a_line_without_a_checksum_is_of_version_0_1_and_stands_before_all_others() -> None:
    old = b'{"v":1,"kind":"a","time":0,"data":{}}\n'
    after = verify(old, verify(old, Link()))
    assert (after.lines, after.sealed) == (2, 0)
    line, sealed = encode_line(Event("b", {}), after)
    assert verify(line, after) == sealed
    for link, bare in ((sealed, old), (after, old.replace(b'"v":1', b'"v":2'))):
        with pytest.raises(StoreError, match="its checksum is missing or damaged"):
            verify(bare, link)


def test_only_what_goes_on_after_its_end_is_more_than_an_unfinished_line() -> None:
    line, _ = seal(b'{"v":2,"seq":1,"data":{"sum":"x"}}', Link())
    assert not is_whole(line[:-1])
    assert not is_whole(line[:-2])
    assert is_whole(line[:-1] + b"\0")
