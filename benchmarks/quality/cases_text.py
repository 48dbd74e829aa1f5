"""A case that merges what four experts learned on real text, quick enough for ten thousand merges.

The texts of four sets are read once by the pretrained sentence encoder all-MiniLM-L6-v2, whose
features are kept. What is fine-tuned and merged is a small network on top of them, as in the image
case: one short training on all sets, with a head per set that then stays as it is, gives the base;
each expert goes on with one set. So a merge is scored in milliseconds on 480 real texts per set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from benchmarks.quality.cases_core import Case, anchored, identity
from benchmarks.quality.truth import Examples, MergedNetworks
from map_bo.cached import cache_root
from map_bo.errors import MapBoError
from map_bo.evaluators.evaluator import accuracy
from map_bo.problems.cache import read_network, trained_files, write_network
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.problems.zoo.pretrained import encoder_folder, load_pretrained, load_tokenizer
from map_bo.problems.zoo.text_sets import TextSelection, select_texts, text_folder
from map_bo.problems.zoo.token_batches import BATCH, Tokens, features
from map_bo.problems.zoo.training import TRAINING_VERSION, train
from map_bo.rng import child, make_generator

__all__ = ["SETS", "missing_text", "text_case"]

SETS = {
    "text-4": ("sst2", "tweeteval_emotion", "subj", "trec"),
    "text-4-other": ("cr", "mpqa", "snips", "banking77"),
}
"""Case -> its sets; the second one is for settling defaults."""
SIZE = 480
WIDTHS = (384, 128, 48)

_VERSION = 1
_TRAIN = 2000
_BASE = 250
_MOST_TOKENS = 64
_RATE = 1e-3


def missing_text(root: str | Path | None = None) -> str | None:
    """Return why the text sets or their encoder cannot be used, or None when they are there."""
    try:
        folder = text_folder(root)
        encoder_folder()
        load_tokenizer(encoder_folder(), "encoder")
    except MapBoError as error:
        return error.message
    every = [name for names in SETS.values() for name in names]
    absent = [name for name in every if not (folder / name).is_dir()]
    return f"{folder} has no {', '.join(absent)}" if absent else None


def _network(*, generator: Generator) -> nn.Sequential:
    """Return an untrained network from 384 features of a text to 48."""
    with torch.random.fork_rng(devices=[]):
        width, hidden, out = WIDTHS
        model = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, out), nn.ReLU()
        )
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
    return model.eval()


class _Joint(nn.Module):
    """The network with all heads, as one layer; the last input column says which head counts."""

    def __init__(self, trunk: nn.Module, classes: Sequence[int], generator: Generator) -> None:
        super().__init__()
        self.trunk, self.classes = trunk, list(classes)
        total = sum(classes)
        weight = torch.randn(total, WIDTHS[-1], generator=generator) / WIDTHS[-1] ** 0.5
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(total))
        owner = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor(self.classes))
        self.register_buffer("owner", owner)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.trunk(inputs[:, :-1]) @ self.weight.T + self.bias
        own = torch.eq(self.get_buffer("owner"), inputs[:, -1:].long())
        return logits.masked_fill(~own, -1e4)


def _encoded(part: TextSelection) -> tuple[Tensor, Tensor]:
    """Return the encoder's features of training and held-out texts, float32; read once."""
    base = encoder_folder()
    texts = [*part.train, *part.test[:SIZE]]
    told = json.dumps([part.digest, _MOST_TOKENS, SIZE, len(part.train), _VERSION])
    key = hashlib.sha256(told.encode()).hexdigest()[:12]

    def encode(files: Mapping[str, Path]) -> None:
        if read_network(files["features"]) is not None:
            return
        tokenizer: Any = load_tokenizer(base, "encoder")
        ids = tokenizer(texts, truncation=True, max_length=_MOST_TOKENS)["input_ids"]
        tokens = Tokens(tuple(tuple(text) for text in ids))
        model = load_pretrained(base, "encoder").eval()
        order = torch.tensor([len(text) for text in tokens.ids]).argsort(stable=True)
        with torch.inference_mode():
            parts = [
                features(model, *tokens.padded(rows.tolist())) for rows in torch.split(order, BATCH)
            ]
        write_network(files["features"], {"features": torch.cat(parts)[order.argsort()].half()})

    folder = cache_root() / "text-features" / f"{part.name}-{key}"
    held = read_network(trained_files(folder, ("features",), encode)["features"])
    assert held is not None
    found: Tensor = held["features"].float()
    found = found / found.norm(dim=-1, keepdim=True) * found.shape[-1] ** 0.5
    return found[: len(part.train)], found[len(part.train) :]


def _trained(parts: Sequence[TextSelection], settings: Mapping[str, Any]) -> dict[str, Path]:
    """Return the files of base, heads and experts; train, once, what is missing."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    names = ("base", "heads", *(part.name for part in parts))

    def fit(files: Mapping[str, Path]) -> None:
        shown = [_encoded(part)[0] for part in parts]
        labels = [torch.tensor(part.train_labels) for part in parts]
        sizes = [len(part.classes) for part in parts]
        starts = [sum(sizes[:i]) for i in range(len(parts))]
        generator = child(make_generator(settings["seed"]), "text base")
        joint = _Joint(_network(generator=generator), sizes, generator)
        few = [
            torch.cat([x[:_BASE], torch.full((_BASE, 1), float(i))], 1) for i, x in enumerate(shown)
        ]
        wanted = [y[:_BASE] + start for y, start in zip(labels, starts, strict=True)]
        passes = settings["base_epochs"]
        train(joint, torch.cat(few), torch.cat(wanted), passes, _RATE, generator=generator)
        heads = {}
        for part, start, size in zip(parts, starts, sizes, strict=True):
            rows = slice(start, start + size)
            heads[f"{part.name}.weight"] = joint.weight[rows].detach().clone()
            heads[f"{part.name}.bias"] = joint.bias[rows].detach().clone()
        base = _weights(joint.trunk)
        write_network(files["base"], base)
        write_network(files["heads"], heads)
        for part, x, y in zip(parts, shown, labels, strict=True):
            trunk = _network(generator=make_generator(0))
            trunk.load_state_dict(base)
            train(
                nn.Sequential(trunk, _head(heads, part.name)),
                x,
                y,
                settings["epochs"],
                _RATE,
                generator=child(make_generator(settings["seed"]), "text expert", part.name),
            )
            write_network(files[part.name], _weights(trunk))

    return trained_files(cache_root() / "text-small" / key, names, fit)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _head(heads: Mapping[str, Tensor], name: str) -> nn.Linear:
    weight, bias = heads[f"{name}.weight"], heads[f"{name}.bias"]
    with torch.random.fork_rng(devices=[]):
        layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer.requires_grad_(requires_grad=False)


def text_case(
    name: str = "text-4",
    *,
    root: str | Path | None = None,
    seed: int = 0,
    epochs: int = 10,
    base_epochs: int = 4,
) -> tuple[Case, MergedNetworks, list[Examples]]:
    """Return the case, its networks and the held-out examples of each metric.

    Args:
        name: Which case.
        root: Folder of the text sets; None takes it from ``MAP_BO_DATA``.
        seed: Seed of the training.
        epochs: Passes of an expert over its 2000 texts.
        base_epochs: Passes of the base over 250 texts of each set.
    """
    parts = [select_texts(one, root, examples=_TRAIN) for one in SETS[name]]
    settings = {
        "sets": [part.digest for part in parts],
        "seed": seed,
        "epochs": epochs,
        "base_epochs": base_epochs,
        "rate": _RATE,
        "version": [_VERSION, TRAINING_VERSION],
    }
    files = _trained(parts, settings)
    heads = read_network(files["heads"])
    assert heads is not None
    examples = [
        Examples(_encoded(part)[1], torch.tensor(part.test_labels[:SIZE]), _head(heads, part.name))
        for part in parts
    ]
    experts = {part.name: files[part.name] for part in parts}
    networks = MergedNetworks(
        _network(generator=make_generator(0)), files["base"], experts, examples
    )

    def build(lower: float = 0.0, upper: float = 1.0) -> MergedModelProblem:
        def scored(held: Examples) -> Any:
            measure = accuracy(held.inputs, held.labels, batch_size=len(held.labels))
            assert held.head is not None
            head = held.head
            return lambda model: measure(nn.Sequential(model, head))

        return MergedModelProblem(
            _network(generator=make_generator(0)),
            base=files["base"],
            experts=experts,
            evaluators={
                part.name: scored(held) for part, held in zip(parts, examples, strict=True)
            },
            lower=lower,
            upper=upper,
        )

    problem = build()
    about = {**settings, "name": name, "problem": identity(problem.describe())}
    scale = anchored(problem, networks.accuracy)
    wide = partial(build, -3.0, 3.0)
    case = Case(name, "text", problem, networks.accuracy, scale, True, about, wide)
    return case, networks, examples
