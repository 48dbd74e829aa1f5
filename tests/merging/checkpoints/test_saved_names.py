from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.checkpoints.saved_names import (
    Saved,
    left_out_of_files,
    saved_as,
    state_tensors,
)
from map_bo.merging.vectors.live import model_ties
from map_bo.problems.merged.problem import MergedModelProblem
from tests.merging.architectures import ARCHITECTURES, library, new
from tests.merging.small_models import MODELS, build


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_models_of_no_library_are_saved_as_they_are(kind: str) -> None:
    model = build(kind)
    saved = saved_as(model, ["of", "another"])
    assert saved == {name: Saved(name) for name in model.state_dict()}
    assert all(
        part.of(state_tensors(model)[n]) is model.get_parameter(n)
        for n, part in saved.items()
        if "norm" not in n
    )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("vit", "mixtral") else pytest.mark.slow)
        for name in ARCHITECTURES
    ],
)
def test_names_and_values_are_those_in_the_files(tmp_path: Path, name: str) -> None:
    model = new(name)
    save: Callable[..., Any] = model.save_pretrained  # type: ignore[assignment]
    save(tmp_path)
    files = open_checkpoint(tmp_path)
    saved, named = saved_as(model, files.names), state_tensors(model)
    assert saved.keys() >= set(files.names)
    for each in files.names:
        value = saved[each].of(named[saved[each].name])
        assert torch.equal(value, files.load(each))
        # Nothing is copied: what is written to the piece is in the model.
        assert value.untyped_storage().data_ptr() == (
            named[saved[each].name].untyped_storage().data_ptr()
        )
    # Every number of the model is in one of the files' tensors, or in a tied name of one.
    owners = [saved[each].name for each in saved]
    ties = model_ties(model)
    assert all(n in owners or ties.get(n) in owners for n in named)


def test_names_of_the_module_are_taken_where_a_checkpoint_has_them() -> None:
    model = new("mixtral")
    plain = {name: Saved(name) for name in model.state_dict()}
    assert saved_as(model, list(plain)) == plain
    assert saved_as(model, []) == plain
    assert saved_as(model) != plain


class TestComputed:
    """A model whose files hold several of its tensors as one."""

    def model(self, seed: int) -> nn.Module:
        transformers = library()
        if not hasattr(transformers, "NomicBertConfig"):
            pytest.skip("this transformers is older than the model")
        config = transformers.NomicBertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model: nn.Module = transformers.AutoModel.from_config(config)
        return model.eval()

    def test_its_files_are_refused_and_its_modules_are_merged(self, tmp_path: Path) -> None:
        base, expert = self.model(0), self.model(1)
        settings: dict[str, Any] = {"evaluators": {"m": lambda model: 0.5}, "check_base": False}
        tested = MergedModelProblem(self.model(2), base=base, experts={"e": expert}, **settings)
        with tested.load(torch.ones(1)) as model:
            torch.testing.assert_close(model.state_dict(), expert.state_dict())
        for name, each in (("base", base), ("e", expert)):
            each.save_pretrained(tmp_path / name)  # type: ignore[operator]
        tested = MergedModelProblem(
            self.model(2), base=tmp_path / "base", experts={"e": tmp_path / "e"}, **settings
        )
        with pytest.raises(MergeError, match=r"hold what is computed .*Wqkv\.weight") as caught:
            tested.prepare()
        assert "models in memory" in str(caught.value.hint)


def test_what_a_library_computes_is_not_asked_of_the_base(tmp_path: Path) -> None:
    transformers = library()
    config = transformers.MarianConfig(
        d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, vocab_size=12,
        pad_token_id=0, decoder_start_token_id=0, max_position_embeddings=8,
    )  # fmt: skip
    models = []
    for seed in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            models.append(transformers.MarianMTModel(config))
        models[-1].save_pretrained(tmp_path / str(seed))
    positions = {f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder")}
    assert left_out_of_files(models[0], models[0].state_dict()) == positions
    assert left_out_of_files(nn.Linear(1, 1), ["weight"]) == set()
    tested = MergedModelProblem(
        models[0], base=tmp_path / "0", experts={"e": tmp_path / "1"},
        evaluators={"m": lambda model: 0.5}, check_base=False,
    )  # fmt: skip
    with tested.load(torch.ones(1)) as model:
        torch.testing.assert_close(model.state_dict(), models[1].state_dict())
