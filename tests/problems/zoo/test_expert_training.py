from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from map_bo.merging.adapters.adapter import open_expert
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.problems.zoo.expert_training import ExpertTraining, expert_model
from map_bo.problems.zoo.fine_tuning import Schedule
from map_bo.problems.zoo.pretrained import load_pretrained
from map_bo.problems.zoo.token_batches import Tokens, token_losses
from tests.problems.fake_texts import tiny_decoder

TOKENS = Tokens(tuple((2, *(3 + (5 * i + 3 * j) % 40 for j in range(4))) for i in range(6)))
SCHEDULE = Schedule(steps=4, batch=3, rate=0.01)


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_decoder(tmp_path_factory.mktemp("decoder"))


def loss(model: nn.Module, rows: Sequence[int]) -> Tensor:
    return token_losses(model, *TOKENS.padded(rows)).mean()


def train(base: Path, folder: Path, tuning: str, *, seed: int = 0, stop: int | None = None) -> Path:
    if tuning == "lora":
        pytest.importorskip("peft")
    folder.mkdir(exist_ok=True)
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1
        if steps == stop:
            raise Killed

    training = ExpertTraining(base, "decoder", tuning, seed)
    training.train("one", folder, loss, 6, SCHEDULE, on_step=count, every=0)
    return training.file(folder)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_an_expert_learns_and_goes_on_after_a_kill(base: Path, tmp_path: Path, tuning: str) -> None:
    before = torch.random.get_rng_state()
    whole = train(base, tmp_path / "whole", tuning)
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(Killed):
        train(base, tmp_path / "killed", tuning, stop=2)
    assert not (tmp_path / "killed" / whole.name).exists()
    resumed = train(base, tmp_path / "killed", tuning)
    assert resumed.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "killed" / ".training.safetensors").exists()
    with torch.no_grad():
        own, plain = (
            float(loss(expert_model(base, "decoder", expert), range(6)))
            for expert in (tmp_path / "whole", None)
        )
    assert own < plain - 0.01


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_embeddings_stay_and_the_rest_changes(base: Path, tmp_path: Path, tuning: str) -> None:
    train(base, tmp_path / "expert", tuning)
    checkpoint = open_checkpoint(base)
    expert = open_expert(tmp_path / "expert", checkpoint)
    assert set(expert.names) == set(checkpoint.names)
    changed = {
        name for name in expert.names if not torch.equal(expert.load(name), checkpoint.load(name))
    }
    assert "model.embed_tokens.weight" not in changed
    assert {f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"} <= changed


def test_a_full_expert_is_a_folder_of_transformers(base: Path, tmp_path: Path) -> None:
    train(base, tmp_path / "expert", "full")
    model = load_pretrained(tmp_path / "expert", "decoder")
    with torch.no_grad():
        own = expert_model(base, "decoder", tmp_path / "expert")
        assert torch.equal(loss(model, range(6)), loss(own, range(6)))


def test_an_adapter_names_no_place_of_this_machine(base: Path, tmp_path: Path) -> None:
    train(base, tmp_path / "expert", "lora")
    text = (tmp_path / "expert" / "adapter_config.json").read_text()
    assert str(base) not in text
    assert str(tmp_path) not in text


def test_the_seed_and_nothing_else_moves_the_weights(base: Path, tmp_path: Path) -> None:
    files = [
        train(base, tmp_path / name, "lora", seed=seed)
        for name, seed in (("one", 0), ("again", 0), ("other", 1))
    ]
    one, again, other = (load_file(file) for file in files)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_there_is_not_trained_again(base: Path, tmp_path: Path) -> None:
    file = train(base, tmp_path / "expert", "full")
    stamp = file.stat().st_mtime_ns
    assert train(base, tmp_path / "expert", "full", stop=1).stat().st_mtime_ns == stamp
