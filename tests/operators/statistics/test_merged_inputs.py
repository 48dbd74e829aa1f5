from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.merging.export.model import merge_checkpoints
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.operators.recipes import merge_again
from map_bo.operators.statistics.input_products import grams
from map_bo.operators.statistics.merged_inputs import block_of, merged_grams
from map_bo.operators.statistics.regmean import RegMean, RegMeanPlusPlus
from map_bo.operators.statistics.statistics import save_statistics
from map_bo.rng import make_generator
from tests.operators.expert_statistics import inputs

State = dict[str, Tensor]
EXPERTS = ("math", "code")


class Block(nn.Module):
    """Two linear layers with something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        moved: Tensor = x + self.down(torch.tanh(self.up(x)))
        return moved


class Net(nn.Module):
    """An input layer, two blocks and a head, which is made before it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.embed = nn.Linear(7, 6, bias=False)
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x)
        return out


def states() -> tuple[State, dict[str, State]]:
    generator = make_generator(0)
    shapes = {name: tensor.shape for name, tensor in Net().state_dict().items()}
    base = {n: 0.5 * torch.randn(s, generator=generator) for n, s in shapes.items()}
    experts = {
        e: {n: t + 0.2 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        for e in EXPERTS
    }
    return base, experts


def data() -> dict[str, Tensor]:
    return {e: inputs(e, 60, 7) for e in EXPERTS}


def regression(weights: list[Tensor], x: list[Tensor]) -> Tensor:
    """Return the weight (``outputs x inputs``) that reproduces both layers' outputs best."""
    left = sum(v.T @ v / len(v) for v in x)
    right = sum(v.T @ v / len(v) @ w.double().T for v, w in zip(x, weights, strict=True))
    assert isinstance(left, Tensor)
    assert isinstance(right, Tensor)
    found: Tensor = torch.linalg.solve(left, right).T
    return found


def naive(experts: dict[str, State], x: dict[str, Tensor]) -> State:
    """Return the merge with 1 / N each, layer by layer as the paper has it."""
    mine = [experts[e] for e in EXPERTS]
    merged = {n: torch.stack([s[n] for s in mine]).double().mean(0) for n in mine[0]}
    flow = [x[e].double() for e in EXPERTS]
    merged["embed.weight"] = regression([s["embed.weight"] for s in mine], flow)
    flow = [v @ merged["embed.weight"].T for v in flow]
    for i in (0, 1):
        up, down = f"layers.{i}.up", f"layers.{i}.down"
        # Within a block inputs are those that the expert's own layers make.
        between = [
            torch.tanh(v @ s[f"{up}.weight"].double().T + s[f"{up}.bias"].double())
            for v, s in zip(flow, mine, strict=True)
        ]
        merged[f"{up}.weight"] = regression([s[f"{up}.weight"] for s in mine], flow)
        merged[f"{down}.weight"] = regression([s[f"{down}.weight"] for s in mine], between)
        flow = [
            v
            + torch.tanh(v @ merged[f"{up}.weight"].T + merged[f"{up}.bias"])
            @ merged[f"{down}.weight"].T
            + merged[f"{down}.bias"]
            for v in flow
        ]
    merged["head.weight"] = regression([s["head.weight"] for s in mine], flow)
    return merged


def test_it_is_the_merge_of_the_paper_and_leaves_the_model_alone() -> None:
    base, experts = states()
    x = data()
    model = Net().train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    batches = {e: [(x[e][:40],), (x[e][40:],)] for e in EXPERTS}
    known = merged_grams(model, base, experts, batches, alpha=1.0, ridge=0.0, data="numbers")
    assert model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    vectors = TaskVectors.load(
        open_checkpoint(base), {e: open_checkpoint(s) for e, s in experts.items()}
    )
    flat = torch.empty(vectors.layout.size)
    operator = RegMeanPlusPlus(statistics=known, alpha=1.0, ridge=0.0)
    operator.check_experts({e: open_checkpoint(s) for e, s in experts.items()})
    operator.prepare(vectors).write(torch.tensor([0.5, 0.5]), flat)
    found = vectors.layout.state_dict(flat, {})
    expected = naive(experts, x)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-3, atol=1e-4, msg=name)
    for e in EXPERTS:
        told = known[e]
        assert told.kind == "merged_grams"
        assert told.examples == 60
        assert told.data == "numbers"
        assert told.settings["coefficients"] == {"math": 0.5, "code": 0.5}
        assert told.settings["rows"]["embed.weight"] == 60


def test_first_layers_see_the_data_and_later_ones_the_merged_model() -> None:
    base, experts = states()
    x = data()
    batches = {e: [(x[e],)] for e in EXPERTS}
    merged = merged_grams(Net(), base, experts, batches)
    for e in EXPERTS:
        model = Net()
        model.load_state_dict(experts[e])
        own = grams(model, batches[e])
        names = own.tensors.names
        assert merged[e].tensors.names == names
        same = {
            n
            for n in names
            if torch.allclose(own.tensors.load(n), merged[e].tensors.load(n), atol=1e-5)
        }
        assert same == {"embed.weight"}


def test_coefficients_decide_what_the_merged_blocks_are() -> None:
    base, experts = states()
    batches = {e: [(v,)] for e, v in data().items()}
    alone = merged_grams(Net(), base, experts, batches, coefficients={"math": 1.0, "code": 0.0})
    model = Net()
    model.load_state_dict(experts["math"])
    own = grams(model, batches["math"])
    for name in own.tensors.names:
        found = alone["math"].tensors.load(name)
        torch.testing.assert_close(found, own.tensors.load(name), rtol=1e-3, atol=1e-4)


def test_the_recipe_is_followed(tmp_path: Path) -> None:
    base, experts = states()
    where: dict[str, Path] = {}
    for name, state in {"base": base, **experts}.items():
        where[name] = tmp_path / f"{name}.pt"
        torch.save(state, where[name])
    mine = {e: where[e] for e in EXPERTS}
    known = merged_grams(Net(), where["base"], mine, {e: [(v,)] for e, v in data().items()})
    files = {e: save_statistics(tmp_path / f"{e}.safetensors", s) for e, s in known.items()}
    first = merge_checkpoints(
        where["base"],
        mine,
        {"math": 0.4, "code": 0.6},
        tmp_path / "first",
        operator=RegMeanPlusPlus(statistics=files),
        progress=False,
    )
    second = merge_again(first, tmp_path / "second", progress=False)
    assert open_checkpoint(first).digest() == open_checkpoint(second).digest()
    with pytest.raises(MergeError, match="in the merged model; inner products") as caught:
        RegMean(files).prepare(TaskVectors.load(open_checkpoint(base), _opened(experts)))
    assert "merged_grams" in str(caught.value.hint)


def _opened(experts: dict[str, State]) -> dict[str, Checkpoint]:
    return {e: open_checkpoint(s) for e, s in experts.items()}


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3"),
        ("encoder.block.11.layer.0.SelfAttention.q.weight", "encoder.block.11"),
        ("0.weight", "0"),
        ("head.weight", "head"),
        ("fc1.weight", "fc1"),
        ("weight", ""),
        ("vision_model.embeddings.class_embedding", "vision_model.embeddings"),
    ],
)
def test_blocks(name: str, block: str) -> None:
    assert block_of(name) == block


def refused(message: str, **changes: object) -> None:
    base, experts = states()
    x = data()
    given: dict[str, object] = {"batches": {e: [(x[e],)] for e in EXPERTS}, "model": Net()}
    given |= {"base": base, "experts": experts, **changes}
    with pytest.raises(MergeError, match=message) as caught:
        merged_grams(**given)  # type: ignore[arg-type]
    assert caught.value.hint


def test_what_cannot_be() -> None:
    batch = [(torch.zeros(2, 7),)]
    refused("no batches for code", batches={"math": batch})
    refused("batches for code are an iterator", batches={"math": batch, "code": iter(batch)})
    refused("no linear layers", model=nn.Flatten())
    refused("no layer's weight has 'nothing'", only="nothing")
    refused("coefficients must be given for math, code, got math", coefficients={"math": 1.0})
    refused("not all 0", coefficients={"math": 0.0, "code": 0.0})
    refused("not negative", coefficients={"math": 1.0, "code": -0.5})
    refused("there were no batches for math", batches={"math": [], "code": batch})
    refused("there were no batches for code", batches={"math": batch, "code": []})
