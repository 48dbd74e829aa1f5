from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from map_bo.errors import DataError, EvaluationError
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.problems.problem import Problem
from map_bo.problems.zoo.data import digits_split, transform
from map_bo.problems.zoo.digits import DigitsZoo, cache_root, digits_problem
from map_bo.problems.zoo.training import as_inputs, network
from map_bo.rng import make_generator
from tests.contracts.problem_contract import ProblemContract

TINY = DigitsZoo(2, epochs=1)


class TestDigitsContract(ProblemContract):
    @pytest.fixture
    def problem(self, tiny_zoo: MergedModelProblem) -> Problem:
        return tiny_zoo


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arch": "resnet"}, "no architecture 'resnet'"),
        ({"epochs": 0}, "epochs must .* got 0"),
        ({"epochs": -3}, "epochs must .* got -3"),
    ],
)
def test_refuses_impossible_training(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        digits_problem(2, **settings)


# --- cache


def test_the_cache_is_where_it_is_told_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAP_BO_CACHE", str(tmp_path / "environment"))
    assert cache_root() == tmp_path / "environment"
    assert cache_root(tmp_path) == tmp_path
    monkeypatch.delenv("MAP_BO_CACHE")
    assert cache_root() == Path(platformdirs.user_cache_dir("map_bo"))


def test_the_folder_names_everything_that_weights_depend_on(tmp_path: Path) -> None:
    folders = {
        DigitsZoo(4, **settings).folder(tmp_path)
        for settings in ({}, {"seed": 1}, {"epochs": 3}, {"arch": "cnn"})
    }
    assert len(folders) == 4
    assert DigitsZoo(4).folder(tmp_path) == DigitsZoo(8, epochs=20).folder(tmp_path)


def test_trains_once_and_shares_experts_between_sizes(tmp_path: Path) -> None:
    first = TINY.checkpoints(tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in (first.base, *first.experts.values())}
    more = DigitsZoo(3, epochs=1).checkpoints(tmp_path)
    assert tuple(more.experts) == ("rot90", "invert", "flip")
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    left = {path.name for path in TINY.folder(tmp_path).iterdir()}
    assert left == {f"{n}.safetensors" for n in ("base", *more.experts)} | {".lock"}


@pytest.mark.parametrize("which", ["base", "invert"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "garbage", "empty", "missing"])
def test_damaged_files_are_trained_again(which: str, damage: str, zoo_cache: Path) -> None:
    files = TINY.checkpoints()
    path = files.base if which == "base" else files.experts[which]
    whole = path.read_bytes()
    match damage:
        case "truncated":
            path.write_bytes(whole[:-100])
        case "altered":
            path.write_bytes(whole[:-100] + bytes(100))
        case "garbage":
            path.write_bytes(b"not a checkpoint")
        case "empty":
            path.write_bytes(b"")
        case _:
            path.unlink()
    assert TINY.checkpoints() == files
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(DataError, match="trained experts cannot be kept in") as caught:
        TINY.checkpoints(blocked)
    assert caught.value.hint is not None
    assert "MAP_BO_CACHE" in caught.value.hint


def test_a_full_disk_leaves_no_half_written_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(DataError, match="No space left on device"):
        TINY.checkpoints(tmp_path)
    assert [path.name for path in TINY.folder(tmp_path).iterdir()] == [".lock"]


@pytest.mark.slow
def test_processes_that_train_at_once_agree(tmp_path: Path) -> None:
    code = (
        "import sys, torch; torch.set_num_threads(1); "
        "from map_bo.problems.zoo.digits import DigitsZoo; "
        "files = DigitsZoo(3, epochs=1).checkpoints(sys.argv[1]); print(files.base)"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = {worker.communicate(timeout=100)[0].strip() for worker in workers}
    assert said == {str(DigitsZoo(3, epochs=1).checkpoints(tmp_path).base)}
    assert all(worker.returncode == 0 for worker in workers)


def test_shows_which_network_is_trained_and_nothing_when_none_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    TINY.checkpoints(tmp_path, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    for what in ("the base", "expert rot90", "expert invert"):
        assert f"training {what}" in shown.err
    assert "trained 3 networks" in shown.err
    TINY.checkpoints(tmp_path, progress=True)
    assert capsys.readouterr().err == ""


# --- the problem


def test_experts_are_good_at_their_task_and_merging_is_a_compromise() -> None:
    problem = digits_problem(4)
    anchors = problem.space.anchors()
    assert anchors.names == ("base", "rot90", "invert", "flip", "permute", "uniform blend")
    seen = problem.evaluate(anchors.X, generator=make_generator(0))
    base, experts, blend = seen.Y[0], seen.Y[1:5], seen.Y[5]
    own = experts.diagonal()
    others = experts[~torch.eye(4, dtype=torch.bool)]
    assert bool((own > 0.93).all())
    assert bool(((base > 0.5) & (base < 0.8)).all())
    assert bool((others < own.min() - 0.2).all())
    assert bool((blend > base + 0.05).all())
    assert bool((blend < own - 0.1).all())


def test_experts_are_close_to_their_base() -> None:
    files = DigitsZoo(4).checkpoints()
    flat = [
        torch.cat([value.flatten() for _, value in sorted(load_file(path).items())])
        for path in (files.base, *files.experts.values())
    ]
    for expert in flat[1:]:
        assert 0.9 < float(F.cosine_similarity(expert, flat[0], dim=0)) < 0.999


def test_accuracies_are_proportions_of_the_examples(tiny_zoo: MergedModelProblem) -> None:
    seen = tiny_zoo.evaluate(torch.zeros(1, 2), generator=make_generator(0))
    assert bool((seen.counts == 50).all())
    torch.testing.assert_close((seen.Y * 50).round(), seen.Y * 50)
    everything = digits_problem(2, epochs=1)
    assert bool(
        (everything.evaluate(torch.zeros(1, 2), generator=make_generator(0)).counts == 797).all()
    )


def test_images_are_scored_one_by_one(tiny_zoo: MergedModelProblem) -> None:
    seen = tiny_zoo.evaluate(torch.full((1, 2), 0.5), generator=make_generator(0))
    for j, (name, sets) in enumerate(tiny_zoo.example_sets.items()):
        assert (sets.size, sets.divisible) == (50, True)
        assert sets.strata is not None
        assert len(set(sets.strata.tolist())) == 10
        assert float(seen.examples[0][name].values.mean()) == float(seen.Y[0, j])


def test_the_accuracy_is_that_of_the_base_network_on_changed_images() -> None:
    zoo = TINY
    problem = digits_problem(2, epochs=1)
    model = network("mlp", generator=make_generator(0))
    model.load_state_dict(load_file(zoo.checkpoints().experts["invert"]))
    _, _, images, labels = digits_split()
    right = model(as_inputs(transform("invert", images))).argmax(-1) == torch.from_numpy(labels)
    seen = problem.evaluate(torch.tensor([[0.0, 1.0]]), generator=make_generator(0))
    assert float(seen.Y[0, 1]) == pytest.approx(float(right.float().mean()), abs=0.003)


@pytest.mark.parametrize("size", [0, 798, -1, True, 10.0])
def test_refuses_numbers_of_examples_that_there_are_not(size: Any) -> None:
    with pytest.raises(DataError, match="size must") as caught:
        digits_problem(2, epochs=1, size=size)
    assert caught.value.hint is not None
    assert "from 1 to 797" in caught.value.hint


def test_the_old_name_of_size_works_and_warns() -> None:
    with pytest.warns(DeprecationWarning, match=r"digits_problem\(size=") as told:
        old = digits_problem(2, epochs=1, examples=50)
    assert told[0].filename == __file__
    assert old.describe() == digits_problem(2, epochs=1, size=50).describe()


def test_the_description_tells_problems_apart() -> None:
    described = [digits_problem(2, epochs=1, size=size).describe() for size in (50, 60, None)]
    assert described[0]["zoo"] == {
        "experts": 2,
        "arch": "mlp",
        "seed": 0,
        "epochs": 1,
        "version": 1,
        "examples": 50,
    }
    assert len({json.dumps(one, sort_keys=True) for one in described}) == 3


def test_bounds_blocks_and_the_sum_shape_the_space() -> None:
    assert digits_problem(2, epochs=1, lower=-1, upper=2).space.lower == (-1.0, -1.0)
    bounded = digits_problem(2, epochs=1, sum_at_most=1.2).space
    assert bounded.names == ("rot90", "invert")
    assert bounded.contains(torch.tensor([[0.5, 0.7], [0.6, 0.7]])).tolist() == [True, False]
    blocks = {"first": r"^0\.", "last": r"^2\."}
    split = digits_problem(2, epochs=1, blocks=blocks, sum_at_most=1.0)
    assert split.space.names == ("rot90/first", "rot90/last", "invert/first", "invert/last")
    rows = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.6, 0.0, 0.6, 0.0]])
    assert split.space.contains(rows).tolist() == [True, False]
    same = digits_problem(2, epochs=1, operator=TaskArithmetic(blocks=blocks))
    first = split.evaluate(rows[:1], generator=make_generator(0))
    assert torch.equal(first.Y, same.evaluate(rows[:1], generator=make_generator(0)).Y)


def test_refuses_blocks_beside_an_operator() -> None:
    with pytest.raises(DataError, match="blocks and an operator were both given"):
        digits_problem(2, epochs=1, blocks={"all": "*"}, operator=TaskArithmetic())


def test_bfloat16_vectors_measure_nearly_the_same() -> None:
    X = torch.tensor([[0.4, 0.5]])
    full = digits_problem(2).evaluate(X, generator=make_generator(0))
    half = digits_problem(2, dtype=torch.bfloat16).evaluate(X, generator=make_generator(0))
    torch.testing.assert_close(full.Y, half.Y, atol=0.02, rtol=0)


def test_the_cnn_merges_with_its_buffers() -> None:
    problem = digits_problem(2, arch="cnn", epochs=1, size=200)
    X = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.5]])
    seen = problem.evaluate(X, generator=make_generator(0))
    assert bool(seen.ok.all())
    files = DigitsZoo(2, arch="cnn", epochs=1).checkpoints()
    model = network("cnn", generator=make_generator(0))
    model.load_state_dict(load_file(files.experts["rot90"]))
    _, _, images, labels = digits_split()
    shown = as_inputs(transform("rot90", images[:200]))
    right = model(shown).argmax(-1) == torch.from_numpy(labels[:200])
    assert float(seen.Y[1, 0]) == pytest.approx(float(right.float().mean()), abs=0.011)


def test_losses_and_probabilities_have_gradients() -> None:
    for measure in ("loss", "probability"):
        problem = digits_problem(2, size=64, measure=measure, gradients=True)
        seen = problem.evaluate(torch.full((1, 2), 0.4), generator=make_generator(0))
        slopes, noise = seen.filled_gradients()
        assert slopes.shape == (1, 2, 2)
        assert bool((slopes != 0).all())
        assert bool((noise > 0).all())
        assert problem.metrics[0].kind == ("loss" if measure == "loss" else "proportion")
        assert problem.describe()["zoo"]["measure"] == measure
    assert "measure" not in digits_problem(2).describe()["zoo"]
    with pytest.raises(EvaluationError, match=r"\(Accuracy\) has none"):
        digits_problem(2, gradients=True)
    with pytest.raises(DataError, match=r"measure must be one of accuracy, prob.* got 'auc'"):
        digits_problem(2, measure="auc")
