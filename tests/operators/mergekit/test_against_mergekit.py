"""map_bo gives the merges of mergekit wherever both define the same; else the difference is shown.

mergekit is an oracle of tests alone (extra ``benchmark``); ``make test-mergekit`` installs it.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.operators import from_mergekit
from map_bo.operators.averages import Slerp, WeightedAverage, spherical_mean
from map_bo.operators.nearswap import NearSwap
from map_bo.operators.sce import Sce
from map_bo.operators.shared_regions import Ram
from map_bo.operators.sparse import (
    Breadcrumbs,
    Dare,
    Della,
    Magnitude,
    Ties,
    elected_sum,
    weighted_sum,
)
from map_bo.operators.spherical import MultiSlerp, NuSlerp
from map_bo.operators.stock import ModelStock
from map_bo.rng import make_generator
from tests.operators.oracle import (
    State,
    assert_same,
    ours,
    seeded,
    states,
    theirs,
    vectors_of,
    without,
)

pytest.importorskip(
    "mergekit.merge_methods", reason="mergekit is the oracle: pip install 'map-bo[benchmark]'"
)

MODELS = states()
PAIR = without(MODELS, "e2")
TWO = without(PAIR, "base")
coefficients = st.lists(st.floats(0.05, 1.5), min_size=3, max_size=3)


def deltas_of(models: dict[str, State], name: str) -> Tensor:
    return torch.stack([models[e][name] - models["base"][name] for e in models if e != "base"])


class TestAverages:
    @given(c=coefficients)
    @settings(max_examples=5)
    def test_linear_is_the_weighted_average(self, c: list[float]) -> None:
        left = ours(WeightedAverage(), MODELS, c)
        assert_same(left, theirs("linear", without(MODELS, "base"), base=None, weight=c))
        # So is linear with the base among the models, at weight 0.
        assert_same(left, theirs("linear", MODELS, weight=[0.0, *c]))

    @given(c=st.lists(st.floats(-1.5, 1.5), min_size=3, max_size=3))
    @settings(max_examples=10)
    def test_task_arithmetic(self, c: list[float]) -> None:
        assert_same(ours(TaskArithmetic(), MODELS, c), theirs("task_arithmetic", MODELS, weight=c))

    @pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 0.9, 1.0])
    def test_slerp_of_two_experts(self, t: float) -> None:
        left = ours(Slerp(of="weights", norms="own"), PAIR, [1 - t, t])
        assert_same(left, theirs("slerp", TWO, base="e0", t=t))

    @pytest.mark.parametrize("t", [0.25, 0.5])
    def test_slerp_of_almost_parallel_experts_is_the_chord_in_mergekit(self, t: float) -> None:
        near = without(states(2, spread=0.002))
        left = ours(Slerp(of="weights", norms="own"), near, [1 - t, t])
        right = theirs("slerp", without(near, "base"), base="e0", t=t)
        chord = ours(WeightedAverage(), near, [1 - t, t])
        assert_same(right, chord)
        # Above a cosine of .9995 arc and chord differ by at most angle^2 / 8 of the weights.
        for name, tensor in left.items():
            gap = (tensor - right[name]).norm() / tensor.norm()
            assert gap <= math.acos(0.9995) ** 2 / 8

    @pytest.mark.parametrize("c", [(0.5, 0.5), (0.8, 0.2), (1.0, 0.0)])
    def test_nuslerp(self, c: tuple[float, float]) -> None:
        turned: dict[str, Any] = {"weight": [3 * w for w in c], "nuslerp_flatten": True}
        left = ours(Slerp(of="deltas", norms="own"), PAIR, c)
        assert_same(left, theirs("nuslerp", PAIR, **turned))
        left = ours(Slerp(of="weights", norms="own"), PAIR, c)
        assert_same(left, theirs("nuslerp", TWO, base=None, **turned))

    def test_nuslerp_row_by_row_is_another_merge(self) -> None:
        rows = theirs("nuslerp", PAIR, weight=[0.5, 0.5], nuslerp_flatten=False)
        whole = ours(Slerp(of="deltas", norms="own"), PAIR, [0.5, 0.5])
        torch.testing.assert_close(rows["h.0.bias"], whole["h.0.bias"])  # it is one row
        assert not torch.allclose(rows["h.0.weight"], whole["h.0.weight"], atol=1e-3)

    def test_nuslerp_where_one_expert_left_a_tensor_as_it_was(self) -> None:
        frozen = {**PAIR, "e0": {**PAIR["e0"], "h.0.bias": PAIR["base"]["h.0.bias"]}}
        left = ours(Slerp(of="deltas", norms="own"), frozen, [0.5, 0.5])["h.0.bias"]
        right = theirs("nuslerp", frozen, weight=[0.5, 0.5])["h.0.bias"]
        delta, pre = deltas_of(frozen, "h.0.bias")[1], frozen["base"]["h.0.bias"]
        torch.testing.assert_close(left, pre + 0.5 * delta)  # no direction: the average
        torch.testing.assert_close(right, pre + math.sin(math.pi / 4) * delta)  # a right angle

    @pytest.mark.parametrize("count", [2, 3])
    def test_karcher_is_the_mean_on_the_sphere(self, count: int) -> None:
        models = states(count)
        left = ours(Slerp(of="weights", norms="mean"), models, [1 / count] * count)
        right = theirs("karcher", without(models, "base"), base=None, max_iter=100, tol=1e-7)
        assert_same(left, right, rtol=1e-4, atol=1e-5)

    def test_multislerp_is_the_chord_brought_to_the_sphere(self) -> None:
        # In the halves of two it is the mean on the sphere.
        left = ours(Slerp(of="deltas", norms="mean"), PAIR, [0.5, 0.5])
        assert_same(left, theirs("multislerp", PAIR, weight=[1.0, 1.0]))
        # Elsewhere it is the average of the unit vectors, at the mean of the lengths: what its
        # step along the tangent adds is zero.
        share = torch.tensor([0.7, 0.2, 0.1])
        right = theirs("multislerp", MODELS, weight=share.tolist())
        for name, tensor in right.items():
            deltas = deltas_of(MODELS, name).flatten(1)
            lengths = deltas.norm(dim=1)
            chord = share @ (deltas / lengths[:, None])
            mean = MODELS["base"][name].flatten() + (share @ lengths) * chord / chord.norm()
            torch.testing.assert_close(tensor.flatten(), mean, rtol=1e-4, atol=1e-5)
            arc = spherical_mean((deltas @ deltas.T).double(), share.double())
            assert not torch.allclose(arc.float() @ deltas, mean - MODELS["base"][name].flatten())


class TestOnTheSphere:
    @pytest.mark.parametrize("c", [(0.5, 0.5), (0.8, 0.2), (1.0, 0.0)])
    @pytest.mark.parametrize("along", ["row", "column"])
    def test_nuslerp_of_rows_and_columns(self, along: str, c: tuple[float, float]) -> None:
        turned: dict[str, Any] = {
            "weight": [3 * w for w in c],
            "nuslerp_flatten": False,
            "nuslerp_row_wise": along == "column",
        }
        left = ours(NuSlerp(along=along), PAIR, c)
        assert_same(left, theirs("nuslerp", PAIR, **turned))
        left = ours(NuSlerp(along=along, of="weights"), PAIR, c)
        assert_same(left, theirs("nuslerp", TWO, base=None, **turned))

    @given(c=coefficients)
    @settings(max_examples=5)
    def test_multislerp_of_any_number(self, c: list[float]) -> None:
        shares = [w / sum(c) for w in c]
        right = theirs("multislerp", MODELS, weight=c)
        assert_same(ours(MultiSlerp(), MODELS, shares), right, rtol=1e-4, atol=1e-5)
        right = theirs("multislerp", without(MODELS, "base"), base=None, weight=c)
        left = ours(MultiSlerp(of="weights"), MODELS, shares)
        assert_same(left, right, rtol=1e-4, atol=1e-5)

    def test_multislerp_a_part_of_the_way(self) -> None:
        c = [0.1, 0.3, 0.2]
        right = theirs("multislerp", MODELS, weight=c, normalize_weights=False)
        assert_same(ours(MultiSlerp(), MODELS, c), right, rtol=1e-4, atol=1e-5)


class TestAsTheyAre:
    """Methods that have no weights in mergekit."""

    @pytest.mark.parametrize("t", [1e-4, 0.1, 0.3, 5.0])
    def test_nearswap(self, t: float) -> None:
        one = without(MODELS, "e1", "e2")
        left = ours(NearSwap(strength=t, unit="absolute"), one, [1.0])
        assert_same(left, theirs("nearswap", one, t=t))

    @pytest.mark.parametrize("rows", [False, True])
    @pytest.mark.parametrize("count", [2, 3, 4])
    def test_model_stock(self, count: int, rows: bool) -> None:
        # Task vectors with a common part, so that no angle is above a right one.
        models = states(count)
        for name in models["base"]:
            common = states(1, spread=0.5)["e0"][name] - models["base"][name]
            for n in range(count):
                models[f"e{n}"][name] = models[f"e{n}"][name] + common
        operator = ModelStock(each="row" if rows else "tensor")
        left = ours(operator, models, [1 / count] * count)
        assert_same(left, theirs("model_stock", models, filter_wise=rows), rtol=1e-4, atol=1e-5)

    def test_model_stock_at_obtuse_angles_goes_backwards_in_mergekit(self) -> None:
        pre, step = torch.zeros(4), torch.tensor([1.0, 0.0, 0.0, 0.0])
        aside = torch.tensor([0.0, 1.0, 0.0, 0.0])
        models = {"base": {"w": pre}, "e0": {"w": step + aside}, "e1": {"w": aside / 2 - step}}
        assert torch.equal(ours(ModelStock(), models, [0.5, 0.5])["w"], pre)
        right = theirs("model_stock", models)["w"]
        assert float(right @ (models["e0"]["w"] + models["e1"]["w"])) < 0

    @pytest.mark.parametrize("density", [0.05, 0.25, 0.85, 1.0])
    @pytest.mark.parametrize("count", [2, 3])
    def test_sce(self, density: float, count: int) -> None:
        models = states(count)
        left = ours(Sce(density=density), models, [1.0] * count)
        assert_same(left, theirs("sce", models, select_topk=density))

    def test_sce_of_small_steps_has_equal_shares_in_mergekit(self) -> None:
        near = states(2, spread=1e-4)
        for name in near["base"]:  # one expert moved ten times as far
            near["e0"][name] = near["base"][name] + 10 * (near["e0"][name] - near["base"][name])
        left = ours(Sce(density=1.0), near, [1.0] * 2)["h.0.bias"] - near["base"]["h.0.bias"]
        right = theirs("sce", near)["h.0.bias"] - near["base"]["h.0.bias"]
        deltas = deltas_of(near, "h.0.bias")
        both = (deltas.sign().sum(0).abs() == 2).nonzero().flatten()
        mean = deltas.mean(0)
        torch.testing.assert_close(right[both], mean[both], rtol=1e-2, atol=1e-6)
        shares = deltas.square().sum(1) / deltas.square().sum()
        torch.testing.assert_close(left[both], (shares @ deltas)[both], rtol=1e-2, atol=1e-6)

    @pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5])
    def test_ram(self, threshold: float) -> None:
        left = ours(Ram(threshold=threshold, rescale=0.0), MODELS, [1.0] * 3)
        assert_same(left, theirs("ram", MODELS, epsilon=threshold))
        plus = Ram(threshold=threshold, rescale=0.7, most=1.5, over="tensor")
        right = theirs("ramplus_tl", MODELS, epsilon=threshold, r=0.7, alpha=1.5)
        assert_same(ours(plus, MODELS, [1.0] * 3), right)


class TestElections:
    @given(c=coefficients, density=st.sampled_from([0.05, 0.25, 0.5, 0.85, 1.0]))
    @settings(max_examples=8)
    def test_ties(self, c: list[float], density: float) -> None:
        settings: dict[str, Any] = {
            "density": density,
            "trim": "tensor",
            "election": "weighted_mass",
        }
        for normalise, normalisation in ((True, "weights"), (False, "none")):
            left = ours(Ties(normalisation=normalisation, scale=0.7, **settings), MODELS, c)
            right = theirs(
                "ties", MODELS, weight=c, density=density, normalize=normalise, scale=0.7
            )
            assert_same(left, right)

    def test_negative_weights(self) -> None:
        c = [0.8, -0.5, 0.3]
        settings: dict[str, Any] = {"density": 0.5, "trim": "tensor", "election": "weighted_mass"}
        left = ours(Ties(normalisation="none", **settings), MODELS, c)
        assert_same(left, theirs("ties", MODELS, weight=c, density=0.5, normalize=False))

    @pytest.mark.parametrize("election", ["mass", "weighted_mass"])
    def test_the_papers_ties_with_equal_coefficients(self, election: str) -> None:
        operator = Ties(density=0.25, trim="tensor", election=election)
        right = theirs("ties", MODELS, weight=1.0, density=0.25, scale=0.4)
        assert_same(ours(operator, MODELS, [0.4] * 3), right)

    def test_numbers_equal_to_the_threshold(self) -> None:
        # Quarters are exact: of eight numbers four have the magnitude of the fourth.
        pre = torch.zeros(8)
        tuned = torch.tensor([1.0, 0.75, 0.5, -0.5, 0.5, -0.5, 0.25, 0.25])
        models = {"base": {"w": pre}, "e0": {"w": tuned}}
        left = ours(Magnitude(density=0.5, trim="tensor"), models, [1.0])["w"]
        right = theirs("ties", models, weight=1.0, density=0.5)["w"]
        assert left.tolist() == [1.0, 0.75, 0.5, -0.5, 0.5, -0.5, 0.0, 0.0]
        assert int((right != 0).sum()) == 4  # which of the equal ones is left to a sort

    def test_a_share_that_is_a_whole_number(self) -> None:
        # In floating point .29 * 100 is a little less than 29.
        weights = torch.arange(1.0, 101.0)
        models = {"base": {"w": torch.zeros(100)}, "e0": {"w": weights}}
        left = ours(Magnitude(density=0.29, trim="tensor"), models, [1.0])["w"]
        right = theirs("ties", models, weight=1.0, density=0.29)["w"]
        assert int((left != 0).sum()) == 29
        assert int((right != 0).sum()) == 28

    @pytest.mark.parametrize("density", [0.15, 0.5, 0.95, 1.0])
    @pytest.mark.parametrize("joining", ["sum", "elect"])
    def test_breadcrumbs(self, density: float, joining: str) -> None:
        c = [0.5, 1.2, 0.3]
        operator = Breadcrumbs(
            density=density,
            gamma=0.05,
            joining=joining,
            election="weighted_mass",
            normalisation="none",
            scale=0.6,
        )
        method = "breadcrumbs" if joining == "sum" else "breadcrumbs_ties"
        right = theirs(method, MODELS, weight=c, density=density, gamma=0.05, scale=0.6)
        assert_same(ours(operator, MODELS, c), right)

    def test_breadcrumbs_without_outliers_keep_the_largest(self) -> None:
        left = ours(Magnitude(density=0.25, trim="tensor"), MODELS, [0.5, 1.2, 0.3])
        right = theirs("breadcrumbs", MODELS, weight=[0.5, 1.2, 0.3], density=0.25, gamma=0.0)
        assert_same(left, right)

    def test_a_share_of_less_than_one_number(self) -> None:
        models = {"base": {"w": torch.zeros(3)}, "e0": {"w": torch.tensor([1.0, 3.0, 2.0])}}
        left = ours(Breadcrumbs(density=0.2, gamma=0.0), models, [1.0])["w"]
        assert left.tolist() == [0.0, 3.0, 0.0]
        # mergekit rounds it down to none here, and up to one for TIES.
        right = theirs("breadcrumbs", models, weight=1.0, density=0.2, gamma=0.0)["w"]
        assert right.tolist() == [0.0, 0.0, 0.0]
        right = theirs("ties", models, weight=1.0, density=0.2)["w"]
        assert right.tolist() == [0.0, 3.0, 0.0]


class TestChance:
    """Masks differ; what does not depend on them agrees."""

    @pytest.mark.parametrize(
        ("method", "operator"),
        [
            ("dare_linear", Dare(drop_rate=0.0)),
            (
                "dare_ties",
                Dare(
                    drop_rate=0.0, joining="elect", election="weighted_mass", normalisation="none"
                ),
            ),
            ("della_linear", Della(drop_rate=0.0, epsilon=0.0, joining="sum")),
            (
                "della",
                Della(
                    drop_rate=0.0, epsilon=0.0, election="weighted_mass", normalisation="weights"
                ),
            ),
        ],
    )
    def test_with_nothing_dropped(self, method: str, operator: Dare | Della) -> None:
        c = [0.5, 1.2, 0.3]
        assert_same(ours(operator, MODELS, c), theirs(method, MODELS, weight=c, density=1.0))

    @pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della_linear", "della"])
    @pytest.mark.parametrize("normalise", [True, False])
    def test_joining_with_mergekits_masks(self, method: str, normalise: bool) -> None:
        sparsify = pytest.importorskip("mergekit.sparsify")
        c = torch.tensor([0.5, 1.2, 0.3])
        kept: dict[str, Any] = {"density": 0.4, **({"epsilon": 0.1} if "della" in method else {})}
        how = "della_magprune" if "della" in method else "random"
        for name in MODELS["base"]:
            one = {model: {name: state[name]} for model, state in MODELS.items()}
            with seeded(5):
                right = theirs(method, one, weight=c.tolist(), normalize=normalise, **kept)[name]
            with seeded(5):
                rows = torch.stack(
                    [
                        sparsify.sparsify(
                            delta,
                            method=sparsify.SparsificationMethod(how),
                            rescale_norm=sparsify.RescaleNorm.l1,
                            **kept,
                        )
                        for delta in deltas_of(one, name)
                    ]
                ).flatten(1)
            if method.endswith("linear"):
                joined = weighted_sum(rows, c / c.sum() if normalise else c)
            else:
                joined = elected_sum(rows, c, "weighted_mass", "weights" if normalise else "none")
            pre = MODELS["base"][name].flatten()
            torch.testing.assert_close(pre + joined, right.flatten())

    def test_dare_drops_as_many_and_rescales_otherwise(self) -> None:
        n, rate = 40_000, 0.8
        models = wide(n)
        delta = deltas_of(models, "w")[0].flatten()
        left = (ours(Dare(drop_rate=rate), models, [1.0])["w"]).flatten()
        with seeded(3):
            right = theirs("dare_linear", models, weight=1.0, density=1 - rate)["w"].flatten()
        bound = 5 * math.sqrt(n * rate * (1 - rate))
        for merged in (left, right):
            assert abs(int((merged == 0).sum()) - n * rate) < bound
        kept = left != 0
        torch.testing.assert_close(left[kept], delta[kept] / (1 - rate), rtol=1e-4, atol=0)
        kept = right != 0
        factor = delta.abs().sum() / delta[kept].abs().sum()  # to the old 1-norm
        torch.testing.assert_close(right[kept], delta[kept] * factor, rtol=1e-4, atol=0)
        torch.testing.assert_close(right.abs().sum(), delta.abs().sum())
        # Both are the paper's factor, to within chance: one standard deviation is
        # sqrt(p / (1 - p) / n) sqrt(E v^2) / E |v|.
        assert abs(float(factor) * (1 - rate) - 1) < 5 * math.sqrt(rate / (1 - rate) / n * 1.6)

    def test_dare_without_rescaling_is_a_scale(self) -> None:
        rate = 0.75
        models = wide(4000)
        left = ours(Dare(drop_rate=rate, scale=1 - rate), models, [1.0])["w"]
        delta = deltas_of(models, "w")[0]
        torch.testing.assert_close(left[left != 0], delta[left != 0])
        right = theirs("dare_linear", models, weight=1.0, density=0.25, rescale=False)["w"]
        torch.testing.assert_close(right[right != 0], delta[right != 0])

    def test_dellas_drop_rates(self) -> None:
        """mergekit's epsilon is half of the paper's, and reaches both ends."""
        rows, width, rate, epsilon = 400, 100, 0.5, 0.4
        models = wide(rows * width, rows)
        left = ours(Della(drop_rate=rate, epsilon=epsilon), models, [1.0])["w"] == 0
        with seeded(4):
            right = (
                theirs("della", models, weight=1.0, density=1 - rate, epsilon=epsilon / 2)["w"] == 0
            )
        order = models["e0"]["w"].abs().argsort(dim=1, descending=True)
        ranks = torch.arange(width)
        wanted = rate - epsilon / 2 + epsilon * ranks / width
        mergekit = rate - epsilon / 2 + epsilon * ranks / (width - 1)
        bound = 5 * math.sqrt(0.25 / rows)
        for dropped, rates in ((left, wanted), (right, mergekit)):
            found = dropped.gather(1, order).double().mean(0)
            assert float((found - rates).abs().max()) < bound

    def test_della_rescales_each_number_or_the_whole_tensor(self) -> None:
        rows, width, rate, epsilon = 400, 100, 0.5, 0.4
        models = wide(rows * width, rows)
        delta = deltas_of(models, "w")[0]
        largest = delta.abs().argmax(dim=1, keepdim=True)
        left = ours(Della(drop_rate=rate, epsilon=epsilon, joining="sum"), models, [1.0])["w"]
        ratio = (left / delta).gather(1, largest)
        # Ours divides by the number's own chance to stay, so that its mean is itself.
        kept = ratio[ratio > 0]
        torch.testing.assert_close(kept, torch.full_like(kept, 1 / 0.7), rtol=1e-4, atol=0)
        with seeded(4):
            right = theirs(
                "della_linear", models, weight=1.0, density=1 - rate, epsilon=epsilon / 2
            )["w"]
        ratio = (right / delta).gather(1, largest)
        factor = delta.abs().sum() / delta[right != 0].abs().sum()
        torch.testing.assert_close(ratio[ratio > 0], factor.expand(int((ratio > 0).sum())))
        # There the largest numbers come out larger than they were, on average.
        assert float(ratio.mean()) > 1.1


def wide(n: int, rows: int = 1) -> dict[str, State]:
    """Return a base of zeros and one expert with one matrix."""
    generator = make_generator(7)
    weights = torch.randn(rows, n // rows, generator=generator)
    return {"base": {"w": torch.zeros_like(weights)}, "e0": {"w": weights}}


def test_the_experts_are_fit_for_exact_comparison() -> None:
    vectors = vectors_of(MODELS)
    for slot in vectors.layout.slots:
        for row in slot.of(vectors.rows[1]), slot.of(vectors.rows[2]):
            assert len(set(row.abs().flatten().tolist())) == row.numel()


@pytest.mark.parametrize(
    ("method", "weights", "parameters"),
    [
        ("linear", [0.2, 0.5, 0.7], {}),
        ("task_arithmetic", [0.2, -0.5, 0.7], {"lambda": 0.5}),
        ("task_arithmetic", [0.2, 0.5, 0.7], {"normalize": True}),
        ("ties", [0.2, 0.5, 0.7], {"density": 0.25}),
        ("ties", [0.2, 0.5, 0.7], {"density": 0.25, "normalize": False, "lambda": 0.8}),
        ("breadcrumbs", [0.2, 0.5, 0.7], {"density": 0.5, "gamma": 0.05}),
        ("breadcrumbs", [0.2, 0.5, 0.7], {"density": 0.5, "gamma": 0.05, "normalize": True}),
        ("breadcrumbs_ties", [0.2, 0.5, 0.7], {"density": 0.5, "gamma": 0.05}),
        ("nuslerp", [0.2, 0.6], {}),
        ("nuslerp", [0.0, 0.0], {}),
        ("multislerp", [0.3, 0.3], {}),
        ("dare_ties", [0.2, 0.5, 0.7], {}),
        ("della", [0.2, 0.5, 0.7], {"lambda": 1.5}),
        ("della_linear", [0.2, 0.5, 0.7], {"normalize": True}),
    ],
)
def test_a_recipe_is_read_as_mergekit_reads_it(
    method: str, weights: list[float], parameters: dict[str, Any]
) -> None:
    chosen = without(MODELS, "e2") if len(weights) == 2 else MODELS
    sources = [f"org/e{i}" for i in range(len(weights))]
    read = from_mergekit(
        {
            "merge_method": method,
            **({} if method == "linear" else {"base_model": "org/base"}),
            "models": [
                {"model": source, "parameters": {"weight": weight}}
                for source, weight in zip(sources, weights, strict=True)
            ],
            "parameters": parameters,
        }
    )
    left = ours(read.operator, chosen, list(read.coefficients.values()))
    models, base = (without(chosen, "base"), None) if method == "linear" else (chosen, "base")
    assert_same(left, theirs(method, models, base=base, weight=weights, **parameters))
