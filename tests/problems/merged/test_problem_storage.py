"""Problems under a cap of memory: the same measurements, wherever the task vectors are."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import CheckpointSource
from map_bo.merging.export.model import ExportSettings
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.operators.sparse import Ties
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.problems.zoo.digits import digits_problem
from map_bo.rng import make_generator
from tests.merging.small_models import build, family, inputs

G = make_generator(0)
X = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.2, 0.5, 0.9]], dtype=torch.float64)
ROWS = 4 * 4 * 160  # of the MLP and its three experts in float32


def mean_output(model: nn.Module) -> float:
    return float(model(inputs("mlp")).detach().sigmoid().mean())


def spread(model: nn.Module) -> float:
    return float(model(inputs("mlp")).detach().sigmoid().std())


def problem(**changes: Any) -> MergedModelProblem:
    base, experts = family("mlp")
    settings: dict[str, Any] = {
        "base": base,
        "experts": experts,
        "evaluators": {"mean": mean_output, "spread": spread},
        **changes,
    }
    return MergedModelProblem(build("mlp", 5), **settings)


def rows_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("rows/*/rows"))


@pytest.mark.parametrize("operator", [TaskArithmetic(), Ties()])
def test_mapped_task_vectors_give_the_same_measurements(
    operator: MergeOperator, tmp_path: Path
) -> None:
    seen = problem(operator=operator).evaluate(X, generator=G)
    for settings in ({"max_memory": ROWS - 1}, {}):
        mapped = problem(operator=operator, cache_dir=tmp_path, **settings)
        assert not mapped._loaded  # nothing is read or written yet
        found = mapped.evaluate(X, generator=G)
        assert torch.equal(found.Y, seen.Y)
        assert len(rows_in(tmp_path)) == 1


def test_the_description_tells_what_was_used(tmp_path: Path) -> None:
    plain = problem().describe()
    assert problem(max_memory=ROWS, cache_dir=tmp_path).describe() == plain
    assert problem(max_memory=ROWS, dtype="auto").describe() == plain
    narrow = problem(max_memory=ROWS - 1, dtype="auto", cache_dir=tmp_path)
    assert narrow.describe() == {**plain, "dtype": "bfloat16"}
    mapped = problem(max_memory=ROWS - 1, cache_dir=tmp_path)
    assert mapped.describe() == {**plain, "mapped": True}
    half = problem(dtype=torch.float16)
    assert half.describe() == {**plain, "dtype": "float16"}
    torch.testing.assert_close(
        half.evaluate(X, generator=G).Y, problem().evaluate(X, generator=G).Y, rtol=0, atol=2e-3
    )
    assert not rows_in(tmp_path)


def test_the_users_cache_is_the_default(zoo_cache: Path) -> None:
    before = len(rows_in(zoo_cache))
    problem(max_memory=ROWS - 1, experts=dict(list(family("mlp")[1].items())[:2])).prepare()
    assert len(rows_in(zoo_cache)) == before
    tested = problem(max_memory=ROWS - 1)
    tested.prepare()
    assert len(rows_in(zoo_cache)) == before + 1


def test_what_fits_nowhere_is_told_when_the_problem_is_made() -> None:
    with pytest.raises(MergeError, match=r"max_memory must .* got 'much'"):
        problem(max_memory="much")
    with pytest.raises(MergeError, match=r"cannot be stored as torch\.int8"):
        problem(dtype=torch.int8)


def test_other_experts_and_other_metrics_keep_the_cap(tmp_path: Path) -> None:
    tested = problem(max_memory=ROWS // 2, cache_dir=tmp_path)
    part = tested.restricted(["spread"])
    assert torch.equal(part.evaluate(X, generator=G).Y, problem().evaluate(X, generator=G).Y[:, 1:])
    assert len(rows_in(tmp_path)) == 1
    merged = tested.merged(X[2])
    experts: Mapping[str, str | CheckpointSource] = {"both": merged, "e1": "e1"}
    c = torch.tensor([[0.4, 0.7]], dtype=torch.float64)
    above = tested.with_experts(experts, ["mean"])
    assert above.describe()["mapped"]
    plain = problem().with_experts(experts, ["mean"])
    assert torch.equal(above.evaluate(c, generator=G).Y, plain.evaluate(c, generator=G).Y)
    assert len(rows_in(tmp_path)) == 2


def test_a_problem_goes_to_other_processes(tmp_path: Path) -> None:
    tested = problem(cache_dir=tmp_path)
    expected = tested.evaluate(X, generator=G).Y  # the rows are mapped by now
    found = pickle.loads(pickle.dumps(tested))
    assert torch.equal(found.evaluate(X, generator=G).Y, expected)
    assert len(rows_in(tmp_path)) == 1


def test_mapped_pages_do_not_count_against_the_memory_of_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"weight": torch.randn(1000, 3000, generator=make_generator(0))}
    experts = {"up": {"weight": 1.1 * base["weight"]}, "down": {"weight": 0.9 * base["weight"]}}
    tested = MergedModelProblem(
        nn.Linear(3000, 1000, bias=False),
        base=base,
        experts=experts,
        evaluators={"mean": lambda model: 0.5},
        cache_dir=tmp_path,
    )
    mapped_pages = []

    def file_pages() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("RssFile")).split()[1])

    before = file_pages()
    with tested.load(torch.tensor([0.3, 0.4])):
        mapped_pages.append(file_pages() - before)
    from map_bo.problems.merged import problem as merged

    def write(*_: Any, **__: Any) -> Path:
        mapped_pages.append(file_pages() - before)
        return tmp_path

    monkeypatch.setattr(merged, "export_model", write)
    tested.export(torch.tensor([0.3, 0.4]), tmp_path / "out", settings=ExportSettings("1GB"))
    rows = 3 * 12_000_000
    assert mapped_pages[0] > rows * 0.9
    assert mapped_pages[1] < rows * 0.2


def test_digits_under_a_cap(zoo_cache: Path) -> None:
    settings: dict[str, Any] = {"experts": 2, "epochs": 2, "size": 50}
    plain = digits_problem(**settings)
    before = len(rows_in(zoo_cache))
    capped = digits_problem(**settings, max_memory="10kB")
    x = X[:, :2]
    assert torch.equal(capped.evaluate(x, generator=G).Y, plain.evaluate(x, generator=G).Y)
    assert len(rows_in(zoo_cache)) == before + 1
    assert capped.describe() == {**plain.describe(), "mapped": True}
    narrow = digits_problem(**settings, max_memory="40kB", dtype="auto")
    assert narrow.describe()["dtype"] == "bfloat16"
