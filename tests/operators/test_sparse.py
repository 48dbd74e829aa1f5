from __future__ import annotations

import pytest

from map_bo.merging.operator import MergeOperator
from map_bo.operators.sparse import Breadcrumbs, Dare, Della, Magnitude, Ties
from tests.contracts.operator_contract import OperatorContract

BLOCKS = {"early": r"^first\.", "late": "*"}


class TestSparse(OperatorContract):
    storage_error = 5e-2

    @pytest.fixture(
        params=[
            Ties(),
            Ties(search=["density", "scale"], blocks=BLOCKS),
            Ties(trim="tensor", election="weighted_mass", normalisation="weights"),
            Ties(election="count", normalisation="none", density=0.6),
            Magnitude(trim="tensor", density=0.3),
            Magnitude(search={"density": (0.1, 0.5)}),
            Breadcrumbs(),
            Breadcrumbs(search=["density", "gamma"], trim="global", joining="elect"),
            Dare(),
            Dare(joining="elect", drop_rate=0.5, search=["drop_rate"]),
            Della(),
            Della(joining="sum", search=["drop_rate", "epsilon", "scale"]),
        ],
        ids=lambda operator: f"{operator.name}-{'-'.join(operator.search)}",
    )
    def operator(self, request: pytest.FixtureRequest) -> MergeOperator:
        made: MergeOperator = request.param
        return made
