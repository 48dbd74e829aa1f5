"""Merging files into a folder: what comes out, and what is refused, leaving nothing behind."""

from __future__ import annotations

import os
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.on_disk import OnDiskVectors
from map_bo.merging.vectors.operator import Deltas, PreparedMerge
from map_bo.operators.averages import Slerp, WeightedAverage
from map_bo.operators.sparse import Dare, Ties
from map_bo.space import CoefficientSpace
from tests.merging.checkpoint_files import BASE, COEFFICIENTS, EXPERTS, merged
from tests.merging.hard_checkpoints import hard_tensors, loaded, saved
from tests.merging.refusing import C, Family, Refused, merge


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class TestResults:
    def test_task_arithmetic(self, family: Family, tmp_path: Path) -> None:
        out = merge(family, tmp_path / "m")
        pre, tuned = loaded(family[0]), {name: loaded(path) for name, path in family[1].items()}
        for name, value in loaded(out).items():
            if not value.is_floating_point():
                assert torch.equal(value, pre[name])
                continue
            hand = pre[name] + sum(c * (tuned[e][name] - pre[name]) for e, c in C.items())
            if name.endswith("running_var"):
                hand = torch.stack([hand, pre[name], *(t[name] for t in tuned.values())])
                hand = torch.maximum(hand[0], hand[1:].amin(0))
            torch.testing.assert_close(value, hand, rtol=1e-5, atol=1e-6)
        recipe = yaml.safe_load((out / "recipe.yaml").read_text())
        assert recipe["coefficients"] == C
        assert recipe["merged"] == {"sha256": open_checkpoint(out).digest()}

    def test_coefficients_that_are_left_out_are_zero(self, family: Family, tmp_path: Path) -> None:
        out = merge(family, tmp_path / "m", coefficients={})
        assert open_checkpoint(out).digest() == open_checkpoint(family[0]).digest()

    def test_float64_and_complex_keep_their_precision(self, tmp_path: Path) -> None:
        out = merge((BASE, EXPERTS), tmp_path / "m", coefficients=COEFFICIENTS, check_base=False)
        expected = dict(merged())
        found = loaded(out)
        assert sorted(found) == sorted(expected)
        for name, value in found.items():
            assert torch.equal(value, expected[name])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_ties_that_files_do_not_record_in_blocks(
        self, tmp_path: Path, dtype: torch.dtype
    ) -> None:
        pre, tuned = (
            {name: torch.full((6,), float(value), dtype=dtype) for name in ("embed", "middle")}
            for value in (1, 2)
        )
        out = merge(
            ({**pre, "head": pre["embed"].clone()}, {"a": tuned}),
            tmp_path / "m",
            operator=TaskArithmetic({"early": "^embed", "late": "*"}),
            coefficients={"a/early": 0.5, "a/late": 0.25},
            ties={"head": "embed"},
            check_base=False,
        )
        found = {name: value.tolist()[0] for name, value in loaded(out).items()}
        assert found == {"embed": 1.5, "head": 1.5, "middle": 1.25}
        merged = yaml.safe_load((out / "recipe.yaml").read_text())["merged"]
        assert merged["ties"] == {"head": "embed"}

    def test_more_shards_than_handles(self, family: Family, tmp_path: Path) -> None:
        tensors = {f"w{i:04d}": torch.full((3,), float(i)) for i in range(200)}
        tuned = {name: value + 1 for name, value in tensors.items()}
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 150
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, before[1]))
        try:
            out = merge((tensors, {"a": tuned}), tmp_path / "m", shard_size=1, coefficients={})
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert len(list(out.glob("model-*.safetensors"))) == 200
        assert torch.equal(loaded(out)["w0100"], tensors["w0100"])


class TestInputs:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("who", ["base", "chat"])
    @pytest.mark.parametrize("name", ["block.0.conv.weight", "scalar"])
    def test_nan_and_infinity_wherever_they_are(
        self, refused: Refused, tmp_path: Path, value: float, who: str, name: str
    ) -> None:
        folder = tmp_path / "in" / who
        tensors = loaded(folder)
        tensors[name].view(-1)[-1] = value
        shutil.rmtree(folder)
        saved(folder, tensors)
        label = "the base" if who == "base" else "expert 'chat'"
        message = f"tensor '{name}' of {label} holds NaN or infinity"
        # A coefficient of zero does not hide a broken expert.
        refused(message, check_base=False, coefficients={"math": 1.0})
        refused(message, check_base=False, operator=Ties())
        assert sorted(os.listdir(tmp_path)) == ["in"]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.float8_e4m3fn])
    def test_nan_in_other_dtypes(self, refused: Refused, dtype: torch.dtype) -> None:
        good = {"a": torch.ones(3, 4).to(dtype), "z": torch.ones(5).to(dtype)}
        bad = {**good, "z": torch.tensor([1, 1, 1, 1, float("nan")]).to(dtype)}
        for base, expert, label in ((good, bad, "expert 'e'"), (bad, good, "the base")):
            refused(
                f"tensor 'z' of {label} holds NaN or infinity",
                family=(base, {"e": expert}),
                coefficients={},
            )

    def test_an_adapter_with_nan(self, refused: Refused, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        from tests.merging.adapter_files import SHAPES, small_base, write_adapter

        base = small_base()
        folder = write_adapter(
            tmp_path / "adapter", SHAPES, seed=0, modules=["head"], values=["layers.1.fc.weight"]
        )
        file = folder / "adapter_model.safetensors"
        for name, message in (
            ("head.lora_B.weight", "holds NaN"),
            ("layers.1.fc.weight", "holds NaN"),
        ):
            tensors = load_file(file)
            whole = dict(tensors)
            tensors[f"base_model.model.{name}"][-1, -1] = float("nan")
            save_file(tensors, file)
            refused(message, family=(base, {"a": folder}), coefficients={"a": 1.0})
            save_file(whole, file)

    @pytest.mark.parametrize("operator", [TaskArithmetic(), Ties()])
    def test_an_unrelated_base(self, refused: Refused, tmp_path: Path, operator: Any) -> None:
        generator = torch.Generator().manual_seed(5)
        pre, other = (torch.randn(50, 50, generator=generator) for _ in range(2))
        for dtype in (torch.float32, torch.float64):
            if dtype == torch.float64 and not isinstance(operator, TaskArithmetic):
                continue
            inputs = ({"w": pre.to(dtype)}, {"e": {"w": other.to(dtype)}})
            refused(
                "'e' does not look fine-tuned", family=inputs, operator=operator, coefficients={}
            )
            merge(
                inputs,
                tmp_path / f"m{dtype}",
                operator=operator,
                coefficients={"e": 1.0},
                check_base=False,
            )

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.pop("scalar"), "lacks 1 of the base's tensors: scalar"),
            (lambda t: t.update(more=torch.ones(1)), "1 tensors that the base lacks: more"),
            (lambda t: t.update(one=torch.ones(1)), r"other shapes .*: one \[1\] against \[1, 1\]"),
            (lambda t: t.update(one=torch.ones(1, 1).int()), "other kinds of dtype"),
            (lambda t: t.update(table=torch.ones(6).long()), r"'table' \(torch.int64\) differs"),
            (lambda t: t.update(mask=~t["mask"]), r"'mask' \(torch.bool\) differs"),
        ],
    )
    def test_tensors_that_are_not_those_of_the_base(
        self, refused: Refused, family: Family, change: Any, message: str
    ) -> None:
        tensors = hard_tensors("math")
        change(tensors)
        inputs = (family[0], {**family[1], "math": tensors})
        refused(message, family=inputs)
        if "lacks 1 of" not in message:  # the wide path checks the same
            wide = {**loaded(family[0]), "one": torch.ones(1, 1).double()}
            refused(
                message.replace("other kinds of dtype", "other "),
                family=(wide, inputs[1]),
                check_base=False,
            )

    def test_tied_tensors_that_differ(self, refused: Refused) -> None:
        for dtype in (torch.float32, torch.float64):
            one, two = torch.ones(4, 2, dtype=dtype), torch.zeros(4, 2, dtype=dtype)
            tied, untied = {"a": one, "b": one}, {"a": one, "b": two}
            message = "'[ab]' and '[ab]' are one tensor in the model but differ in "
            refused(message + "expert 'e'", family=(tied, {"e": untied}), coefficients={})
            refused(
                message + "the base",
                family=(untied, {"e": tied}),
                coefficients={},
                ties={"b": "a"},
                check_base=False,
            )

    def test_files_that_are_gone_or_damaged(
        self, refused: Refused, family: Family, tmp_path: Path
    ) -> None:
        refused("does not exist", family=(tmp_path / "nothing", family[1]))
        refused("does not exist", family=(family[0], {"math": tmp_path / "nothing"}))
        shard = sorted(family[1]["code"].glob("*.safetensors"))[-1]
        content = shard.read_bytes()
        shard.write_bytes(content[:-10])
        refused("cannot be read")

    def test_a_file_that_changes_while_it_is_merged(
        self,
        refused: Refused,
        family: Family,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        shard = sorted(family[1]["code"].glob("*.safetensors"))[-1]
        real, count = OnDiskVectors.read, iter(range(1000))

        def read(self: Any, *arguments: Any) -> Tensor:
            if next(count) == 3:
                os.utime(shard, ns=(1, 1))
            return real(self, *arguments)

        monkeypatch.setattr(OnDiskVectors, "read", read)
        refused("has changed since it was opened")

    def test_dtypes_that_cannot_be_merged_this_way(self, refused: Refused) -> None:
        for dtype in (torch.float64, torch.complex64):
            tensors = {"w": torch.ones(3, dtype=dtype)}
            error = refused(
                f"tensor 'w' is {dtype}, and pieces are merged in float32",
                family=(tensors, {"e": {"w": 2 * tensors["w"]}}),
                operator=Ties(),
                coefficients={},
            )
            assert "task arithmetic" in str(error.hint)

    def test_merged_values_beyond_the_range_of_the_base(self, refused: Refused) -> None:
        for dtype, size in (
            (torch.float16, 40_000.0),
            (torch.float8_e5m2, 40_000.0),
            (torch.float8_e4m3fn, 320.0),
        ):
            tensors = [{"w": torch.full((5,), value).to(dtype)} for value in (size, size / 2)]
            refused(
                f"merged values of tensor 'w' are beyond the range of {dtype}",
                family=(tensors[0], {"e": tensors[1]}),
                coefficients={"e": -2.0},
            )

    def test_the_last_number_of_the_range_is_not_beyond_it(self, tmp_path: Path) -> None:
        edge = {"w": torch.tensor([65504.0, 1.0], dtype=torch.float16)}
        tuned = {"w": torch.tensor([65504.0, 2.0], dtype=torch.float16)}
        out = merge((edge, {"e": tuned}), tmp_path / "m", coefficients={"e": 1.0})
        assert loaded(out)["w"].tolist() == [65504.0, 2.0]


class TestSettings:
    def test_coefficients(self, refused: Refused) -> None:
        error = refused("there are no coefficients 'maths'", coefficients={"maths": 1.0})
        assert "math, code, chat" in str(error.hint)
        refused("coefficients code must be finite", coefficients={"code": float("nan")})
        refused("coefficients code must be finite", coefficients={"code": float("inf")})
        searched = Ties(search=["density"])
        refused("no value is given for density", operator=searched)
        refused("density must .* got 1.5", operator=searched, coefficients={**C, "density": 1.5})
        refused("density must .* got -0.1", operator=searched, coefficients={**C, "density": -0.1})
        rate = Dare(search=["drop_rate"])
        refused("drop_rate must .* got 1.0", operator=rate, coefficients={**C, "drop_rate": 1.0})

    @pytest.mark.parametrize("operator", [WeightedAverage(), Slerp()])
    def test_negative_coefficients_where_they_mean_nothing(
        self, refused: Refused, operator: Any
    ) -> None:
        refused(
            "the coefficients code must not be negative",
            operator=operator,
            coefficients={"math": 1.0, "code": -1.0},
        )

    def test_no_experts(self, refused: Refused, family: Family) -> None:
        refused("there are no experts", family=(family[0], {}), coefficients={})

    def test_blocks_that_do_not_fit(self, refused: Refused) -> None:
        blocks = {"a": "nowhere", "rest": "*"}
        for operator in (TaskArithmetic(blocks), Ties(blocks=blocks)):
            refused(
                "no floating tensor belongs to the blocks a", operator=operator, coefficients={}
            )
        refused("belongs to no block", operator=TaskArithmetic({"a": "^embed"}), coefficients={})

    @pytest.mark.parametrize("size", ["abc", "-1", 0, "0MB", ""])
    def test_sizes(self, refused: Refused, size: Any) -> None:
        refused("max_memory must", max_memory=size)
        refused("shard_size must", shard_size=size)

    def test_a_record_that_is_no_data(self, refused: Refused) -> None:
        refused("record.a is a object", record={"a": object()})

    def test_an_operator_that_cannot_merge_by_pieces(self, refused: Refused) -> None:
        @dataclass(frozen=True)
        class Own:
            def space(
                self, experts: tuple[str, ...], *, lower: float, upper: float
            ) -> CoefficientSpace:
                return CoefficientSpace.box(experts, lower=lower, upper=upper)

            def prepare(self, deltas: Deltas) -> PreparedMerge:
                raise AssertionError

        refused("the operator Own cannot merge by pieces", operator=Own())


def test_a_checkpoint_object_may_be_given(family: Family, tmp_path: Path) -> None:
    opened: tuple[Checkpoint, dict[str, Checkpoint]] = (
        open_checkpoint(family[0]),
        {name: open_checkpoint(path) for name, path in family[1].items()},
    )
    one, two = merge(opened, tmp_path / "one"), merge(family, tmp_path / "two")
    assert open_checkpoint(one).digest() == open_checkpoint(two).digest()
