"""Problems of real models whose operator is not linear, or has settings that are searched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from map_bo.loop.result import Result
from map_bo.loop.run import Run
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.operators.averages import Slerp, WeightedAverage
from map_bo.operators.consensus import Consensus
from map_bo.operators.searchable import SearchableOperator
from map_bo.operators.sparse import Breadcrumbs, Dare, Della, Ties
from map_bo.operators.spectral.isotropic import IsoC, IsoCTS
from map_bo.operators.spectral.knots import KnOTS
from map_bo.operators.spectral.tsv import TSVM
from map_bo.operators.statistics.data_free import DataFreeRegMean
from map_bo.plain import to_plain
from map_bo.rng import make_generator
from map_bo.tracking.jsonl import MemoryStore
from map_bo.tracking.store import RunStore
from tests.loop.bowls import quick
from tests.loop.test_run import CrashError, CrashingStore
from tests.merging.small_models import MODELS
from tests.nested.electing import electing, models
from tests.operators.cases import label, merge

SEARCHED = Ties(search=["density", "scale"], blocks={"first": "first", "rest": "*"})
OPERATORS: tuple[SearchableOperator, ...] = (
    Ties(),
    SEARCHED,
    Breadcrumbs(density=0.6),
    Dare(drop_rate=0.3, joining="elect"),
    Della(drop_rate=0.3),
    Consensus(),
    Slerp(of="weights"),
    WeightedAverage(),
    TSVM(),
    IsoC(),
    IsoCTS(),
    KnOTS(density=0.5),
    DataFreeRegMean(),
)
every = pytest.mark.parametrize("operator", OPERATORS, ids=label)


def run(store: RunStore, operator: SearchableOperator, budget: int = 12) -> Result:
    return Run(electing(count=3, operator=operator), quick(budget), store).drive()


@every
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_problem_holds_and_exports_what_the_operator_merges(
    operator: SearchableOperator, kind: str, tmp_path: Path
) -> None:
    if operator.blocks and kind != "mlp":
        pytest.skip("the blocks are those of one model")
    problem = electing(kind, 3, operator=operator)
    x = problem.space.sample(1, generator=make_generator(0))[0]
    base, experts = models(kind, 3)
    vectors = TaskVectors.load(
        open_checkpoint(base),
        {name: open_checkpoint(expert) for name, expert in experts.items()},
        ties={"output.weight": "embed.weight"} if kind == "tied" else None,
    )
    expected = vectors.layout.state_dict(merge(operator, vectors, x), vectors.fixed)
    same(problem.merged(x), expected)
    written = open_checkpoint(problem.export(x, tmp_path / "out"))
    for name, tensor in expected.items():
        canonical = written.ties.get(name, name)
        if canonical in written.names or name in written.names:
            assert torch.allclose(written.load(name), tensor, atol=1e-6), name
    with problem.load(x) as model:
        state = model.state_dict()
        assert all(torch.allclose(state[name], expected[name], atol=1e-6) for name in expected)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-6), name


def test_searched_settings_are_coefficients_of_the_run() -> None:
    result = run(MemoryStore(), SEARCHED)
    space = result.space
    assert space.settings == ("density", "scale")
    space.check(result.seen.X)
    space.check(result.front.X)
    # The anchors came first, and were measured with the settings at rest.
    assert result.seen.X[:5, -2:].tolist() == [[0.2, 1.0]] * 5
    assert len(torch.unique(result.seen.X[5:, -2])) > 3
    choice = result.choose({"e0": 1.0})
    assert list(choice.coefficients) == list(space.names)
    assert 0.05 <= float(choice.coefficients["density"]) <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize("operator", [SEARCHED, Della(drop_rate=0.3)], ids=label)
def test_a_killed_run_goes_on_to_the_same_end(operator: SearchableOperator) -> None:
    def outcome(result: Result) -> list[Any]:
        return [result.seen.X.tolist(), result.seen.Y.tolist(), result.front.X.tolist()]

    whole = MemoryStore()
    expected = outcome(run(whole, operator))
    for at in (3, 9, len(list(whole.read())) - 1):
        store = MemoryStore()
        with pytest.raises(CrashError):
            run(CrashingStore(store, at, after=True), operator)
        assert outcome(run(store, operator)) == expected


@every
def test_description_tells_settings_apart(operator: SearchableOperator) -> None:
    described = electing(count=3, operator=operator).describe()
    assert described["operator"] == to_plain(operator)
    assert described["space"].get("resting", []) == ([0.2, 1.0] if operator is SEARCHED else [])


def test_merges_of_averages_do_not_compose() -> None:
    # An average of averages weighs them alike, whatever the sums of their coefficients.
    assert not electing(count=3, operator=WeightedAverage()).composes
