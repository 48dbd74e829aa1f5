"""Merged models of images, measured with data and settings alone, from folders to numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import map_bo
from map_bo.errors import MapBoError
from map_bo.problems.merged.hf import hf_problem
from map_bo.rng import make_generator
from tests.evaluators.images.tiny import (
    clip,
    draw,
    vit,
    write_images,
    write_processor,
    write_tokenizer,
)

transformers = pytest.importorskip("transformers", reason="`huggingface` is not installed")

COLOURS = {"kind": "zero_shot", "templates": ["a photo of the {}", "the {}"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a base, two experts of its vision tower, and images."""
    base = clip()
    for name, seed in (("base", 0), ("first", 1), ("second", 2)):
        model, change = clip(), clip()
        if seed:
            draw(change.vision_model, seed, 0.03)
            own = model.vision_model.state_dict()
            new = {key: own[key] + value for key, value in change.vision_model.state_dict().items()}
            model.vision_model.load_state_dict(new)
        model.save_pretrained(tmp_path / name)
    write_tokenizer(tmp_path / "base")
    write_processor(tmp_path / "base")
    write_images(tmp_path / "images")
    write_images(tmp_path / "train", each=6)
    assert base.config.projection_dim == 8
    return tmp_path


@pytest.mark.slow
def test_a_front_of_two_experts_without_a_head(folder: Path) -> None:
    images = str(folder / "images")
    data: dict[str, Any] = {"path": images, "limit": 9}
    merged = hf_problem(
        base=str(folder / "base"),
        experts={name: str(folder / name) for name in ("first", "second")},
        tasks={
            "colours": {**COLOURS, "data": data, "metrics": ["accuracy", "loss"]},
            "probed": {
                "kind": "images",
                "data": {"path": images},
                "head": "fit",
                "train": {"path": str(folder / "train")},
                "cache_dir": str(folder / "cache"),
            },
            "sure": {
                "kind": "entropy",
                "of": "zero_shot",
                "data": data,
                "classes": ["red", "blue"],
            },
        },
    )
    names = [metric.name for metric in merged.metrics]
    assert names == ["colours_accuracy", "colours_loss", "probed", "sure"]
    result = map_bo.optimize(merged, budget=8, seed=0)
    assert not any(result.seen.failures or ())
    assert len(result.front) >= 1


def test_a_chosen_merge_scores_the_same_from_its_folder(folder: Path) -> None:
    task = {**COLOURS, "data": {"path": str(folder / "images")}, "metrics": "loss"}
    merged = hf_problem(
        base=str(folder / "base"),
        experts={name: str(folder / name) for name in ("first", "second")},
        tasks={"colours": task},
    )
    x = torch.tensor([0.7, 0.4]).double()
    seen = merged.evaluate(x[None], generator=make_generator(0))
    merged.export(x, folder / "merged")
    model = transformers.CLIPModel.from_pretrained(folder / "merged").eval()
    model_folder = str(folder / "merged")
    settings = {key: value for key, value in task.items() if key != "kind"}
    alone = map_bo.evaluators.ZeroShot(tokenizer=model_folder, processor=model_folder, **settings)
    alone.prepare(model)
    assert float(seen.Y) == pytest.approx(alone(model)["loss"].value, rel=1e-5)


def test_experts_keep_heads_of_their_own(tmp_path: Path) -> None:
    vit(head=False).save_pretrained(tmp_path / "base")
    write_processor(tmp_path / "base", kind="ViT")
    for seed, name in enumerate(("first", "second"), start=1):
        model, change = vit(), vit(seed)
        with torch.no_grad():
            for tensor, other in zip(model.parameters(), change.parameters(), strict=True):
                tensor.add_(0.05 * other)
        draw(model.classifier, seed)
        model.config.id2label = {0: "red", 1: "green", 2: "dark_blue"}
        model.save_pretrained(tmp_path / name)
    data = {"path": write_images(tmp_path / "images")}
    merged = hf_problem(
        base=str(tmp_path / "base"),
        experts={name: str(tmp_path / name) for name in ("first", "second")},
        tasks={
            name: {"kind": "images", "data": data, "metrics": "loss"}
            for name in ("first", "second")
        },
        missing="base",  # the pooling layer, which classifiers lack
    )
    seen = merged.evaluate(torch.eye(2).double(), generator=make_generator(0))
    for row, name in enumerate(("first", "second")):
        expert = transformers.ViTForImageClassification.from_pretrained(tmp_path / name).eval()
        alone = map_bo.evaluators.ImageClassification(
            data=data["path"], processor=str(tmp_path / "base"), metrics="loss"
        )
        alone.prepare(expert)
        expected = alone(expert)["loss"].value
        assert float(seen.Y[row, row]) == pytest.approx(expected, rel=1e-4)


def test_all_that_is_wrong_is_said_at_once(folder: Path) -> None:
    images = {"path": str(folder / "images")}
    merged = hf_problem(
        base=str(folder / "base"),
        experts={"first": str(folder / "first")},
        tasks={
            "few": {**COLOURS, "data": images, "classes": ["red", "green"]},
            "nowhere": {**COLOURS, "data": {"path": str(folder / "nothing")}},
            "wide": {**COLOURS, "data": images, "processor": {"size": 9}},
            "fine": {**COLOURS, "data": images},
        },
    )
    with pytest.raises(MapBoError) as found:
        merged.prepare()
    said = str(found.value)
    assert "3 evaluators cannot be used" in said
    for part in ("2 names, and the data 3 classes", "nothing", "images of 3 x 9 x 9"):
        assert part in said
    assert "'fine'" not in said
