from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from map_bo.nested.result import Exporting, NodeRecord, describe_tree
from map_bo.nested.tree import Group

NODE = NodeRecord("0", "a+b", 1, 2, 2, 7, 14, ({"a": 0.5, "b": 0.25},))
ROOT = NodeRecord("root", "a+b+c", 2, 3, 3, 9, 27)
TREE = Group.of([["a", "b"], "c"])


def test_a_tree_is_described_with_what_each_node_cost() -> None:
    found = describe_tree(TREE, [NODE, ROOT], data_sets=41, tasks=3)
    assert found["tree"] == [["a", "b"], "c"]
    assert found["stages"] == 2
    assert found["flat_evaluations"] == 41 / 3
    assert "[stage 1]  7 evaluations of 2 tasks, 14 data sets" in found["drawn"]
    assert "[stage 2]  9 evaluations of 3 tasks, 27 data sets" in found["drawn"]
    assert found["nodes"] == [NODE.describe(), ROOT.describe()]


def test_the_refinement_is_no_node_of_the_drawing() -> None:
    refine = NodeRecord("refine", "a+b+c", 0, 3, 3, 4, 12)
    found = describe_tree(TREE, [NODE, ROOT, refine], data_sets=53, tasks=3)
    assert "4 evaluations" not in found["drawn"]
    assert found["nodes"][-1]["node"] == "refine"


def test_records_keep_the_key_of_their_version() -> None:
    assert NODE.describe()["handed"] == [{"a": 0.5, "b": 0.25}]
    with pytest.warns(DeprecationWarning, match="is now NodeRecord.promoted"):
        assert NODE.handed == NODE.promoted


class Writer:
    def __init__(self) -> None:
        self.written: dict[str, Any] = {}

    def export(
        self, x: Tensor, out: str | Path, *, record: Mapping[str, Any], settings: Any = None
    ) -> Path:
        self.written = dict(record)
        return Path(out)


def test_a_recipe_holds_the_tree_and_what_nodes_promoted(tmp_path: Path) -> None:
    writer = Writer()
    summary = {"nested": describe_tree(TREE, [NODE, ROOT], data_sets=41, tasks=3)}
    exporting = Exporting(writer, summary)
    assert exporting.export(torch.ones(3), tmp_path, record={"choice": 1}) == tmp_path
    assert writer.written == {
        "choice": 1,
        "nested": {
            "tree": [["a", "b"], "c"],
            "nodes": [
                {"node": "0", "merges": "a+b", "handed": [{"a": 0.5, "b": 0.25}]},
                {"node": "root", "merges": "a+b+c", "handed": []},
            ],
        },
    }
