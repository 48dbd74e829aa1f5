"""Changes of files: of their bytes, and of the values that they hold."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

__all__ = ["mutate_bytes", "mutate_value"]

_TEXTS = [
    *("", "x", "a.b:c", "os:system", "NaN", "Infinity", "-1", "\ud800", "\x00", "../..", "é" * 300),
    *("map_bo." + "a" * 5000, "${oc.env:HOME}", "task_arithmetic", "1" * 5000, "(" * 500, "(a+)+$"),
]
_NUMBERS = [0, 1, -1, 2, 3.5, 1e400, -1e400, float("nan"), 10**30, -(10**30), 2**63, 2**31, 1e-320]
_KEYS = [
    *("class", "fields", "tensor", "dtype", "words", "mapping", "tuple", "path", "_target_", "d"),
    *("_args_", "_partial_", "$float", "nested", "nodes", "tree", "seconds", "name", "x"),
]
_BYTES = [b"{", b"[", b"]", b"}", b'"', b",", b":", b"\n", b"\\u", b"\x00", b"\xff", b"&a", b"*a"]


def mutate_bytes(content: bytes, random: Random) -> bytes:
    """Return bytes of which some were flipped, left out, doubled or put elsewhere."""
    found = bytearray(content)
    for _ in range(random.randint(1, 4)):
        where = random.randint(0, len(found))
        match random.randint(0, 5):
            case 0 if found:
                found[min(where, len(found) - 1)] ^= 1 << random.randint(0, 7)
            case 1:
                del found[where : where + random.randint(1, 20)]
            case 2:
                found[where:where] = random.choice(_BYTES) * random.choice([1, 1, 2, 1000])
            case 3:
                found[where:where] = found[where : where + random.randint(1, 40)]
            case 4:
                del found[where:]
            case _:
                found[where : where + 1] = str(random.choice(_NUMBERS)).encode()
    return bytes(found)


def mutate_value(data: Any, random: Random) -> Any:
    """Return plain data of which one to three parts are something else."""
    data = copy.deepcopy(data)
    for _ in range(random.randint(1, 3)):
        data = _changed(data, random)
    return data


def _changed(data: Any, random: Random) -> Any:
    if isinstance(data, dict) and data and random.random() < 0.93:
        key = random.choice(list(data))
        match random.randint(0, 11):
            case 0:
                del data[key]
            case 1:
                data[random.choice(_KEYS)] = data[key]
            case _:
                data[key] = _changed(data[key], random)
        return data
    if isinstance(data, list) and data and random.random() < 0.9:
        place = random.randrange(len(data))
        match random.randint(0, 8):
            case 0:
                del data[place]
            case 1:
                data.insert(place, copy.deepcopy(data[place]))
            case _:
                data[place] = _changed(data[place], random)
        return data
    return _odd(data, random)


def _odd(data: Any, random: Random) -> Any:
    match random.randint(0, 7):
        case 0:
            return None
        case 1:
            return random.choice([[], {}, [[]], [None], {"x": None}, [data], {"x": data}])
        case 2:
            return random.choice([True, False])
        case 3 | 4:
            return random.choice(_NUMBERS)
        case 5:
            return random.choice(_TEXTS)
        case 6:
            deep: Any = data
            for _ in range(random.choice([3, 60, 400])):
                deep = [deep]
            return deep
    return {random.choice(_KEYS): data, random.choice(_KEYS): random.choice(_NUMBERS)}


def to_json(data: Any) -> bytes:
    """Return JSON of changed data, with what JSON has no words for as Python writes it."""
    return json.dumps(data).encode()
