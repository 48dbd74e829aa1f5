from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from map_bo.errors import CheckpointError, ConfigError
from map_bo.merging.align.conform import align_experts
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.problems.merged.architecture import transformers_model
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.rng import make_generator

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 11}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 12}
TOKENS = torch.arange(6).view(1, 6)


def saved(kind: str, path: Path, trunk: nn.Module | None = None, **settings: Any) -> Any:
    generator = make_generator(len(path.name))
    model = getattr(transformers, kind)(transformers.BertConfig(**SIZES, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    if trunk is not None:
        inner = getattr(model, "bert", model)
        inner.load_state_dict(trunk.state_dict(), strict=False)
        with torch.no_grad():
            for parameter in inner.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)
    return model


def built(base: Path, **experts: Path) -> Any:
    opened = open_checkpoint(base)
    given = {name: open_checkpoint(path) for name, path in experts.items()}
    return transformers_model(opened, align_experts(given, opened, missing="base"))()


def test_the_class_is_that_of_base_or_heads(tmp_path: Path) -> None:
    base = saved("BertModel", tmp_path / "base")
    saved("BertModel", tmp_path / "plain", base)
    saved("BertForSequenceClassification", tmp_path / "cls", base, num_labels=4)
    saved("BertForMaskedLM", tmp_path / "lm")
    assert type(built(tmp_path / "base", e=tmp_path / "plain")).__name__ == "BertModel"
    found = built(tmp_path / "base", e=tmp_path / "cls")
    assert type(found).__name__ == "BertForSequenceClassification"
    assert found.classifier.out_features == 4
    assert type(built(tmp_path / "lm", e=tmp_path / "lm")).__name__ == "BertForMaskedLM"


def test_without_a_named_class_the_model_has_no_head(tmp_path: Path) -> None:
    saved("BertModel", tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace('"architectures"', '"former"'))
    assert type(built(tmp_path / "base")).__name__ == "BertModel"
    # A class with a head that the file does not hold: transformers would draw one by chance.
    config.write_text(
        config.read_text()
        .replace('"former"', '"architectures"')
        .replace("BertModel", "BertForSequenceClassification")
    )
    assert type(built(tmp_path / "base")).__name__ == "BertModel"


def test_what_cannot_be_built_is_told(tmp_path: Path) -> None:
    saved("BertModel", tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    text = config.read_text()
    for change, error, said in (
        (
            text.replace("BertModel", "NoSuchModel"),
            CheckpointError,
            "no architecture 'NoSuchModel'",
        ),
        (text.replace('"bert"', '"nosuch"'), CheckpointError, "cannot read"),
        ("[]", CheckpointError, "not a JSON object"),
        ('{"a": 1}', CheckpointError, "does not name an architecture"),
    ):
        config.write_text(change)
        with pytest.raises(error, match=said):
            built(tmp_path / "base")
    config.unlink()
    with pytest.raises(ConfigError, match=r"has no config.json"):
        built(tmp_path / "base")


def test_classifiers_of_other_widths_over_a_headless_base(tmp_path: Path) -> None:
    base = saved("BertModel", tmp_path / "base")
    experts = {"a": 2, "bb": 5}
    for name, width in experts.items():
        saved("BertForSequenceClassification", tmp_path / name, base, num_labels=width)
    seen = {}

    def scoring(name: str) -> Any:
        def score(model: Any) -> float:
            seen[name] = (model(TOKENS).logits.shape[1], model.config.num_labels, model.num_labels)
            return 0.5

        return score

    opened = open_checkpoint(tmp_path / "base")
    given = {name: open_checkpoint(tmp_path / name) for name in experts}
    aligned = align_experts(given, opened)
    problem = MergedModelProblem(
        transformers_model(opened, aligned),
        base=opened,
        experts=aligned,
        evaluators={name: scoring(name) for name in experts},
    )
    outcome = problem.evaluate(torch.tensor([[0.5, 0.5]]), generator=make_generator(0))
    assert outcome.failures == (None,)
    assert seen == {"a": (2, 2, 2), "bb": (5, 5, 5)}
