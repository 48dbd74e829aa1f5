"""Features and inputs of a space with a choice."""

from __future__ import annotations

import torch

from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from map_bo.surrogates.features import (
    centred,
    feature_groups,
    group_sizes,
    inputs,
    quadratic_features,
    space_features,
    space_groups,
)
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.quadratic import Quadratic
from tests.choices import CHOICE, some_of, truth


def test_inputs_are_other_columns_and_one_column_per_option() -> None:
    X = torch.tensor([[0.25, 1.0, 0.0, 0.2], [0.5, 0.0, 1.0, 0.9], [0.5, 0.0, 2.0, 0.2]])
    expected = [
        [0.25, 1.0, 0.5, 1.0, 0.0, 0.0],  # the density is inactive: in the middle
        [0.5, 0.0, 1.0, 0.0, 1.0, 0.0],
        [0.5, 0.0, 0.5, 0.0, 0.0, 1.0],
    ]
    torch.testing.assert_close(inputs(X.double(), CHOICE), torch.tensor(expected).double())


def test_all_pairs_of_options_are_equally_far_apart() -> None:
    X = torch.tensor([[0.3, 0.3, code, 0.2] for code in (0.0, 1.0, 2.0)]).double()
    X[1, 3] = 0.5  # the middle, where the setting is for the others
    gaps = torch.pdist(inputs(X, CHOICE))
    torch.testing.assert_close(gaps, gaps[:1].expand(3))


def test_features_are_shared_ones_and_those_of_the_rows_own_option() -> None:
    X = CHOICE.sample(40, generator=make_generator(0))
    Z, codes = 2 * inputs(X, CHOICE)[:, :3] - 1, X[:, 2].long()
    Phi, groups = space_features(X, CHOICE), space_groups(CHOICE)
    assert Phi.shape == (40, 6 + 6 + 10 + 6)
    blocks = torch.split(Phi, [6, 6, 10, 6], -1)
    torch.testing.assert_close(blocks[0], quadratic_features(Z[:, :2]))
    for code, block in enumerate(blocks[1:]):
        own = Z if code == 1 else Z[:, :2]  # the density is in the features of TIES alone
        here = (codes == code).unsqueeze(-1)
        torch.testing.assert_close(block, torch.where(here, quadratic_features(own), 0.0))
    assert groups.tolist()[:6] == feature_groups(2).tolist()
    assert groups.tolist()[12:22] == [4 + g for g in feature_groups(3).tolist()]
    assert len(group_sizes(CHOICE)) == 8


def test_without_a_choice_they_are_those_of_the_quadratic() -> None:
    box = CoefficientSpace.box(("a", "b", "c"), lower=-1.0)
    X = box.sample(9, generator=make_generator(0))
    assert torch.equal(space_features(X, box), quadratic_features(centred(X, box)))
    assert torch.equal(space_groups(box), feature_groups(3))
    assert torch.equal(inputs(X, box), box.normalise(X))
    assert group_sizes(box).tolist() == [1, 3, 3, 3]


def test_an_option_learns_from_the_others() -> None:
    # Fourteen rows of two options say nearly all about a third that behaves like them.
    seen = some_of(CHOICE, 60, seed=3)
    rows = (seen.X[:, 2] == 0).nonzero().flatten().tolist()[:14]
    few = (seen.X[:, 2] == 2).nonzero().flatten().tolist()[:2]
    points = some_of(CHOICE, 80, seed=4).X
    points = points[points[:, 2] == 2]
    for surrogate in (Quadratic(), GP()):
        together = surrogate.fit(seen.select(torch.tensor(sorted(rows + few))), CHOICE)
        alone = surrogate.fit(seen.select(torch.tensor(few)), CHOICE)
        errors = [
            float((model.link_mean(points)[:, 1] - truth(points)[:, 1]).square().mean())
            for model in (together, alone)
        ]
        assert errors[0] < 0.5 * errors[1]


def test_partial_rows_are_fitted_metric_by_metric() -> None:
    seen = some_of(CHOICE, 24)
    lacking = torch.zeros(24, 2, dtype=torch.bool)
    lacking[5, 0] = lacking[9, 1] = True
    partial = seen.without(lacking, "it broke")
    points = some_of(CHOICE, 20, seed=5).X
    for surrogate in (Quadratic(), GP()):
        whole, less = (surrogate.fit(one, CHOICE).link_mean(points) for one in (seen, partial))
        assert float((whole - less).detach().abs().max()) < 0.5 * float(truth(points).std())


def test_a_model_takes_further_observations() -> None:
    seen, more = some_of(CHOICE, 20), some_of(CHOICE, 30).select(torch.arange(20, 24))
    for surrogate in (Quadratic(), GP()):
        model = surrogate.fit(seen, CHOICE)
        noise = torch.full((4, 2), 1e-6, dtype=torch.float64)
        wiser = model.condition_on_observations(more.X, more.Y, noise=noise)
        before, after = (one.joint(more.X)[1].diagonal(dim1=-1, dim2=-2) for one in (model, wiser))
        assert bool((after < before).all())
        assert float((wiser.joint(more.X)[0] - more.Y).detach().abs().max()) < 0.1
