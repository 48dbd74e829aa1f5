"""Recalibration and vocabulary rules in the problem of merged models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from map_bo.errors import ConfigError, EvaluationError, MergeError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.export.recipe import read_recipe
from map_bo.merging.vectors.live import model_ties
from map_bo.merging.vectors.recalibration import recalibrate, statistics
from map_bo.problems.merged.imported import imported_problem
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.rng import make_generator
from tests.merging.small_models import Tied, build, family, inputs, tuned
from tests.problems.merged.test_problem import Halving, by_hand

G = make_generator(0)
X = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.4, 0.5, 0.3]], dtype=torch.float64)


def batches() -> list[Tensor]:
    generator = make_generator(5)
    return [torch.randn(8, 1, 6, 6, generator=generator) for _ in range(3)]


def outputs(model: nn.Module) -> Tensor:
    result: Tensor = model(inputs("cnn")).detach().clone()
    return result


def problem(kind: str = "cnn", **changes: Any) -> MergedModelProblem:
    base, experts = family(kind)

    def score(model: nn.Module) -> float:
        return float(model(inputs(kind)).detach().sigmoid().mean())

    settings: dict[str, Any] = {
        "base": base,
        "experts": experts,
        "evaluators": {"one": score, "two": score},
        "recalibration": batches(),
        **changes,
    }
    return MergedModelProblem(build(kind, 5), **settings)


def recalibrated(x: Tensor) -> nn.Module:
    """Return the model merged by hand and recalibrated."""
    model = by_hand("cnn", x)
    recalibrate(model, batches())
    return model


class TestRecalibration:
    @pytest.mark.parametrize("operator", [None, Halving()])
    def test_what_is_measured_loaded_merged_and_exported_is_one_model(
        self, tmp_path: Path, operator: Any
    ) -> None:
        tested = problem(operator=operator)
        plain = problem(operator=operator, recalibration=None)
        seen = tested.evaluate(X, generator=G)
        for i, x in enumerate(X):
            with tested.load(x) as model:
                live, measured = outputs(model), statistics(model)
            assert seen.Y[i].tolist() == pytest.approx([float(live.sigmoid().mean())] * 2)
            with plain.load(x) as model:
                merged = statistics(model)
            assert not torch.allclose(measured["norm.running_mean"], merged["norm.running_mean"])
            if operator is None:
                torch.testing.assert_close(live, outputs(recalibrated(x)), atol=1e-5, rtol=1e-5)
            state = tested.merged(x)
            out = tested.export(x, tmp_path / str(i))
            exported = open_checkpoint(out)
            for loaded in (state, {name: exported.load(name) for name in exported.names}):
                other = build("cnn", 3)
                other.load_state_dict(loaded)
                torch.testing.assert_close(outputs(other), live)
                for name, value in measured.items():
                    assert torch.equal(loaded[name], value)
            names = ["norm.num_batches_tracked", "norm.running_mean", "norm.running_var"]
            assert read_recipe(out)["merged"]["recalibrated"] == names

    def test_the_mergekit_file_says_what_it_leaves_out(self, tmp_path: Path) -> None:
        sources: dict[str, Any] = {}
        base, experts = family("cnn")
        for name, model in {"base": base, **experts}.items():
            plain = problem(base=base, experts={"x": tuned(base, "cnn", 9)}, recalibration=None)
            plain.export(torch.zeros(1), tmp_path / name)
            state = {k: v.contiguous() for k, v in model.state_dict().items()}
            from safetensors.torch import save_file

            save_file(state, tmp_path / name / "model.safetensors")
            (tmp_path / name / "config.json").write_text("{}")
            sources[name] = tmp_path / name
        root = sources.pop("base")
        for name, given in (("with", batches()), ("without", None)):
            tested = problem(base=root, experts=sources, recalibration=given)
            text = (tested.export(X[2], tmp_path / name) / "mergekit.yaml").read_text()
            assert "merge_method: task_arithmetic" in text
            assert ("does not measure the statistics" in text) == (given is not None)

    def test_once_a_candidate_and_anew_for_each(self) -> None:
        calls: list[int] = []

        def source() -> list[Tensor]:
            calls.append(1)
            return batches()

        problem(recalibration=source).evaluate(X, generator=G)
        assert len(calls) == len(X)

    def test_an_evaluator_that_trains_reaches_no_other(self) -> None:
        def spoil(model: nn.Module) -> float:
            model.train()
            return float(model(inputs("cnn")).detach().sigmoid().mean())

        def score(model: nn.Module) -> float:
            return float(model(inputs("cnn")).detach().sigmoid().mean())

        alone = problem(evaluators={"b": score}).evaluate(X, generator=G)
        both = problem(evaluators={"a": spoil, "b": score}).evaluate(X, generator=G)
        assert torch.equal(alone.Y[:, 0], both.Y[:, 1])

    def test_a_broken_candidate_fails_alone(self) -> None:
        base, experts = family("cnn")
        huge = {k: v.detach().clone() for k, v in base.state_dict().items()}
        huge["conv.weight"] = huge["conv.weight"] + 1e30
        tested = problem(experts={**experts, "e2": huge}, check_base=False)
        rows = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
        seen = tested.evaluate(rows, generator=G)
        assert seen.failures[0] is None
        assert "recalibration: the statistics of norm are NaN or infinite" in str(seen.failures[1])
        with pytest.raises(EvaluationError, match="recalibration"), tested.load(rows[1]):
            pass

    def test_parts_and_other_experts_recalibrate_too(self) -> None:
        tested = problem()
        whole = tested.evaluate(X, generator=G)
        part = tested.restricted(("two",)).evaluate(X, generator=G)
        assert torch.equal(part.Y[:, 0], whole.Y[:, 1])
        merge = tested.with_experts({"m": tested.merged(X[2])}, ("one",))
        again = merge.evaluate(torch.ones(1, 1), generator=G)
        torch.testing.assert_close(again.Y[0, 0], whole.Y[2, 0], atol=1e-5, rtol=1e-5)

    def test_it_is_told_in_the_description_only_where_it_is_used(self) -> None:
        assert problem().describe()["recalibration"] is True
        assert "recalibration" not in problem(recalibration=None).describe()
        with_it, without = problem().describe(), problem(recalibration=None).describe()
        assert {k: v for k, v in with_it.items() if k != "recalibration"} == without

    @pytest.mark.parametrize(
        ("kind", "changes", "message"),
        [
            ("mlp", {}, "Mlp has no BatchNorm layers"),
            ("cnn", {"recalibration": []}, "there are no batches"),
            ("cnn", {"recalibration": iter([])}, "an iterator"),
        ],
    )
    def test_refusals(self, kind: str, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(MergeError, match=message):
            problem(kind, **changes).evaluate(X, generator=G)

    def test_gradients_would_leave_it_out(self) -> None:
        with pytest.raises(MergeError, match="gradients were asked for together with recalib"):
            problem(gradients=True)


class Words(nn.Module):
    """An embedding that is the output layer too, of any number of rows."""

    def __init__(self, rows: int, seed: int) -> None:
        super().__init__()
        generator = make_generator(seed)
        self.embed = nn.Embedding(rows, 4)
        self.lm_head = nn.Linear(4, rows, bias=False)
        self.embed.weight.data = torch.randn(rows, 4, generator=generator)
        self.lm_head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.lm_head(self.embed(x))
        return result


def moved(base: Words, rows: int, seed: int) -> Words:
    model = Words(rows, seed)
    kept = min(rows, base.embed.num_embeddings)
    model.embed.weight.data *= 0.3
    model.embed.weight.data[:kept] += base.embed.weight.data[:kept]
    return model


class TestVocabulary:
    def problem(self, vocabulary: Any, **changes: Any) -> MergedModelProblem:
        base = Words(6, 0)
        settings: dict[str, Any] = {
            "base": base,
            "experts": {"more": moved(base, 8, 1), "fewer": moved(base, 5, 2)},
            "evaluators": {"mean": self.score},
            "vocabulary": vocabulary,
            **changes,
        }
        return MergedModelProblem(Words(6, 9), **settings)

    @staticmethod
    def score(model: nn.Module) -> float:
        return float(model(torch.arange(6)).detach().sigmoid().mean())

    def test_a_merge_of_other_vocabularies(self, tmp_path: Path) -> None:
        tested = self.problem("base")
        x = torch.tensor([0.5, 0.7], dtype=torch.float64)
        base = Words(6, 0).embed.weight
        more, fewer = moved(Words(6, 0), 8, 1), moved(Words(6, 0), 5, 2)
        expected = base + 0.5 * (more.embed.weight[:6] - base)
        expected[:5] += 0.7 * (fewer.embed.weight - base[:5])
        with tested.load(x) as model:
            torch.testing.assert_close(model.embed.weight, expected)  # type: ignore[union-attr]
            assert model_ties(model) == {"lm_head.weight": "embed.weight"}
        exported = open_checkpoint(tested.export(x, tmp_path / "out"))
        torch.testing.assert_close(exported.load("embed.weight"), expected.detach())
        # Merges of merges are told apart by what they are made of, not by the rule.
        part = tested.with_experts({"m": tested.merged(x), "more": "more"}, ("mean",))
        torch.testing.assert_close(part.merged(torch.tensor([1.0, 0.0]))["embed.weight"], expected)

    def test_the_description_tells_fitted_experts(self) -> None:
        described = self.problem("base").describe()
        rows = described["experts"]["fewer"]["fitting"]["rows"]
        assert rows["embed.weight"] == {"kept": 5, "dropped": 0, "unchanged": 1}
        base = Words(6, 0)
        experts = {"a": moved(base, 6, 1)}
        fitting = self.problem("base", experts=experts).describe()
        assert fitting == self.problem(None, experts=experts).describe()
        assert "fitting" not in fitting["experts"]["a"]

    def test_without_the_rule_it_is_refused(self) -> None:
        with pytest.raises(MergeError, match="only its vocabulary differs"):
            self.problem(None).evaluate(torch.zeros(1, 2), generator=G)


class TestConfigured:
    @pytest.fixture
    def settings(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        name = "fitting_" + "".join(c for c in tmp_path.name if c.isalnum())
        (tmp_path / f"{name}.py").write_text(
            "from tests.problems.merged.test_problem_recalibration import Words, batches, outputs\n"
            "from tests.merging.small_models import Cnn, inputs\n"
            "def words(): return Words(6, 9)\n"
            "def score(model): return float(model.state_dict()[NAME].detach().sigmoid().mean())\n"
            "NAME = 'embed.weight'\n"
            "def pixels(model): return float(outputs(model).sigmoid().mean())\n"
        )
        base = Words(6, 0)
        torch.save(base.state_dict(), tmp_path / "base.pt")
        torch.save(moved(base, 8, 1).state_dict(), tmp_path / "more.pt")
        monkeypatch.chdir(tmp_path)
        return {
            "model": f"{name}:words",
            "base": "base.pt",
            "experts": {"more": "more.pt"},
            "evaluators": {"mean": f"{name}:score"},
        }

    def test_a_vocabulary_rule(self, settings: dict[str, Any]) -> None:
        problem = imported_problem(**settings, vocabulary="base")
        assert problem.evaluate(torch.ones(1, 1), generator=G).failures == (None,)
        with pytest.raises(ConfigError, match=r"vocabulary must .* got 'all'") as caught:
            imported_problem(**settings, vocabulary="all")  # type: ignore[arg-type]
        assert "base, tokens" in caught.value.message

    def test_recalibration(self, settings: dict[str, Any], tmp_path: Path) -> None:
        base, experts = family("cnn", 1)
        torch.save(base.state_dict(), tmp_path / "base.pt")
        torch.save(experts["e0"].state_dict(), tmp_path / "more.pt")
        name = settings["model"].partition(":")[0]
        changed: Callable[..., MergedModelProblem] = imported_problem
        tested = changed(
            f"{name}:Cnn",
            base="base.pt",
            experts={"e0": "more.pt"},
            evaluators={"mean": f"{name}:pixels"},
            recalibration=f"{name}:batches",
        )
        x = torch.tensor([[0.7]], dtype=torch.float64)
        model = by_hand("cnn", torch.tensor([0.7, 0.0, 0.0]))
        recalibrate(model, batches())
        value = float(outputs(model).sigmoid().mean())
        assert float(tested.evaluate(x, generator=G).Y) == pytest.approx(value, abs=1e-5)


def test_tied_models_of_the_tests_are_vocabularies_too() -> None:
    """The usual small model is refused with the way on, like a real one."""
    base = build("tied")
    expert = {
        k: torch.cat([v, v[:2]]) if v.shape[0] == 6 else v for k, v in base.state_dict().items()
    }
    tested = MergedModelProblem(
        Tied(), base=base, experts={"e": expert}, evaluators={"m": lambda model: 0.5}
    )
    with pytest.raises(MergeError, match="only its vocabulary differs"):
        tested.evaluate(torch.zeros(1, 1), generator=G)
