"""Experts of transformers models: all weights fine-tuned, or a LoRA adapter.

An expert is a folder as transformers or peft writes it, which `map_bo.open_checkpoint` and the
others read. Its training goes on where it was killed (:mod:`map_bo.problems.zoo.fine_tuning`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from filelock import FileLock
from torch import Tensor, nn

from map_bo.errors import DataError, did_you_mean, require
from map_bo.evaluators.data import Data
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.merging.adapters.adapter import open_expert
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.problems.cache import (
    cache_root,
    read_network,
    trained_files,
    training_shown,
    write_network,
)
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.problems.zoo.datasheet import complete_datasheet, lacks_scores, write_text
from map_bo.problems.zoo.fine_tuning import Schedule, fine_tune
from map_bo.problems.zoo.pretrained import Kind, load_pretrained
from map_bo.problems.zoo.text_sets import TextSelection, check_sets, select_texts
from map_bo.rng import child, make_generator
from map_bo.values import whole_number

__all__ = [
    "TUNINGS",
    "BatchLoss",
    "ExpertTraining",
    "TunedProblem",
    "TunedZoo",
    "expert_model",
    "held_out",
    "tuned_problem",
]

logger = logging.getLogger(__name__)

TUNINGS = {"full": "model", "lora": "adapter_model"}
"""Way of fine-tuning -> name of the file that it leaves, without its ending."""

_HELD_OUT = "test.jsonl"
_RANK = 8
_ALPHA = 16

BatchLoss = Callable[[nn.Module, Sequence[int]], Tensor]


@dataclass(frozen=True)
class ExpertTraining:
    """How the experts of a zoo are fine-tuned from their base; embeddings stay as they are.

    Attributes:
        base: Folder of the base.
        kind: What the base is.
        tuning: ``"full"`` (all other weights) or ``"lora"`` (adapters of rank 8 on all linear
            layers).
        seed: Seed of batch orders and of the adapters' initial weights.
    """

    base: Path
    kind: Kind
    tuning: str
    seed: int

    def file(self, folder: Path) -> Path:
        """Return the file of weights in an expert's folder."""
        return folder / f"{TUNINGS[self.tuning]}.safetensors"

    def train(
        self,
        name: str,
        folder: Path,
        loss: BatchLoss,
        examples: int,
        schedule: Schedule,
        *,
        on_step: Callable[[], None],
        every: float = 60.0,
    ) -> None:
        """Write the expert ``name`` to ``folder``, unless it is there.

        Args:
            name: The expert's name; it is part of what its random numbers depend on.
            folder: The folder, which exists.
            loss: Model and rows of a batch -> mean loss.
            examples: Number of examples.
            schedule: How long and how fast.
            on_step: Called after each step.
            every: See :func:`map_bo.problems.zoo.fine_tuning.fine_tune`.

        Raises:
            MissingDependencyError: When transformers, or peft for an adapter, is missing.
        """
        file = self.file(folder)
        if read_network(file) is not None:
            return
        generator = child(make_generator(self.seed), "expert", name)
        base = load_pretrained(self.base, self.kind)
        tuned = self._adapted(base, generator) if self.tuning == "lora" else _frozen(base)
        state = folder / ".training.safetensors"
        fine_tune(
            {key: p for key, p in tuned.named_parameters() if p.requires_grad},
            lambda rows: loss(tuned, rows),
            examples,
            schedule,
            generator=generator,
            state=state,
            every=every,
            on_step=on_step,
        )
        write_network(file, self._weights(tuned, folder))
        state.unlink(missing_ok=True)

    def _adapted(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        require("peft", by="tuning=lora", extra="text" if self.kind == "encoder" else "decoder")
        import peft

        config = peft.LoraConfig(
            r=_RANK, lora_alpha=_ALPHA, target_modules="all-linear", lora_dropout=0.0, bias="none"
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # peft 0.21 asks transformers 5 by a name that will go.
            warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
            tuned: nn.Module = peft.get_peft_model(model, config)
        for key, p in tuned.named_parameters():
            if "lora_A" in key:  # the factors B begin at zero
                nn.init.kaiming_uniform_(p, a=math.sqrt(5), generator=generator)
        return tuned.eval()

    def _weights(self, tuned: Any, folder: Path) -> dict[str, Tensor]:
        """Return what the file of weights holds, after the configuration is written beside it."""
        if self.tuning == "lora":
            import peft

            config = tuned.peft_config["default"]
            config.base_model_name_or_path = None  # a path of this machine
            config.inference_mode = True
            config.save_pretrained(folder)
            return dict(peft.get_peft_model_state_dict(tuned))
        tuned.config.save_pretrained(folder)
        tensors: dict[str, Tensor] = {}
        seen: set[int] = set()
        for key, tensor in tuned.state_dict().items():
            if tensor.data_ptr() not in seen:  # tied weights are kept once
                tensors[key] = tensor
                seen.add(tensor.data_ptr())
        base = open_checkpoint(self.base)
        for key in set(base.names) - tensors.keys():
            constant = base.load(key)
            if not constant.is_floating_point():  # such as the numbers of positions
                tensors[key] = constant
        return tensors


def expert_model(base: Path, kind: Kind, expert: Path | None) -> nn.Module:
    """Return the base with the weights of an expert, or its own.

    Args:
        base: Folder of the base.
        kind: What it is.
        expert: Folder of an expert, or None.
    """
    model = load_pretrained(base, kind)
    if expert is not None:
        given = open_expert(expert, open_checkpoint(base))
        own = model.state_dict()
        weights = {key: given.load(key) for key in given.names if key in own}
        model.load_state_dict(weights, strict=False)
    return model


def _frozen(model: nn.Module) -> nn.Module:
    for key, p in model.named_parameters():
        p.requires_grad_("embed" not in key)
    return model


@lru_cache(maxsize=8)
def _digest(base: Path) -> str:
    return open_checkpoint(base).digest()


@dataclass(frozen=True)
class TunedZoo(ABC):
    """Experts of one pretrained model, one per text set: the settings, and the way to the files.

    Networks are trained once and kept in a folder whose name holds a key of all that they depend
    on, with one folder per set in it; zoos that differ in their sets alone share it.

    Attributes:
        sets: Names of the text sets, one expert each.
        tuning: ``"full"`` or ``"lora"``.
        seed: Seed of the training.
        epochs: Passes of an expert over its training texts.
        root: Folder of the sets; see :func:`map_bo.problems.zoo.text_sets.text_folder`.
        model: Folder of the base; None for the one that a Python package carries.

    Raises:
        DataError: When one of the settings is not possible.
    """

    sets: tuple[str, ...]
    tuning: str
    seed: int
    epochs: int
    root: str | Path | None
    model: str | Path | None

    name: ClassVar[str]
    model_name: ClassVar[str]
    kind: ClassVar[Kind]
    version: ClassVar[int]
    train_examples: ClassVar[int]
    size: ClassVar[int]
    batch: ClassVar[int]
    rates: ClassVar[Mapping[str, float]]
    extra_files: ClassVar[tuple[str, ...]] = ()
    metric: ClassVar[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sets", check_sets(self.sets))
        if self.tuning not in TUNINGS:
            raise DataError(
                f"tuning must be one of {', '.join(TUNINGS)}, got {self.tuning!r}",
                hint=did_you_mean(self.tuning, TUNINGS),
            )
        whole_number("epochs", self.epochs, least=1, error=DataError)
        whole_number("seed", self.seed, error=DataError)

    @abstractmethod
    def base(self, cache_dir: str | Path | None = None) -> Path:
        """Return the folder of the base."""

    @abstractmethod
    def loss(self, part: TextSelection, folder: Path, base: Path) -> BatchLoss:
        """Return what an expert minimises on its training texts."""

    @abstractmethod
    def evaluator(self, folder: Path, base: Path, size: int) -> ExampleEvaluator:
        """Return what scores a model on the first ``size`` held-out texts of a set."""

    @abstractmethod
    def prepare(self, part: TextSelection, folder: Path, base: Path) -> None:
        """Write what a set needs beside its expert, ``extra_files``, where it is missing."""

    @property
    def data(self) -> tuple[TextSelection, ...]:
        """The texts of each set; they are read once per process."""
        return tuple(
            select_texts(name, self.root, examples=self.train_examples) for name in self.sets
        )

    def schedule(self, part: TextSelection) -> Schedule:
        """Return how long and how fast the expert of a set is trained."""
        steps = self.epochs * math.ceil(len(part.train) / self.batch)
        return Schedule(steps, self.batch, self.rates[self.tuning])

    def settings(self, cache_dir: str | Path | None = None) -> dict[str, Any]:
        """Return plain data that all experts of the zoo's folder have in common."""
        return {
            "version": self.version,
            "base": _digest(self.base(cache_dir)),
            "tuning": self.tuning,
            "seed": self.seed,
            "epochs": self.epochs,
            "train_examples": self.train_examples,
            "batch": self.batch,
            "rate": self.rates[self.tuning],
        }

    def describe(self, cache_dir: str | Path | None = None) -> dict[str, Any]:
        """Return plain data that tell this zoo from others, wherever its texts lie."""
        texts = [part.digest for part in self.data]
        return {**self.settings(cache_dir), "sets": list(self.sets), "texts": texts}

    def folder(self, cache_dir: str | Path | None = None) -> Path:
        """Return the folder of the trained files."""
        text = json.dumps(self.settings(cache_dir), sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        return cache_root(cache_dir) / self.name / f"{self.tuning}-v{self.version}-{key}"

    def experts(
        self, cache_dir: str | Path | None = None, *, progress: bool = False, every: float = 60.0
    ) -> dict[str, Path]:
        """Return the folder of each set's expert; train what is missing, going on after a kill.

        Two processes may ask at once: one trains, the other waits for it. Then the zoo's datasheet
        is completed; see :mod:`map_bo.problems.zoo.datasheet`.

        Args:
            cache_dir: Folder to keep them under; see :func:`map_bo.problems.cache.cache_root`.
            progress: Show on the error stream what is being trained.
            every: Seconds of training after which it is kept how far it came.

        Raises:
            DataError: When the texts cannot be read, or the folder cannot be written.
            MissingDependencyError: When an optional package is missing.
        """
        folder, base = self.folder(cache_dir), self.base(cache_dir)
        own = {part.name: f"{part.name}-{part.digest[:8]}" for part in self.data}
        files = [
            f"{where}/{file}"
            for where in own.values()
            for file in (*self.extra_files, TUNINGS[self.tuning])
        ]
        folders = {name: folder / where for name, where in own.items()}
        trained_files(
            folder, files, lambda _: self._train(folders, base, progress=progress, every=every)
        )
        for part in self.data:
            _write_held_out(part, folders[part.name])
        if lacks_scores(folder, tuple(own.values())):
            try:
                # A lock of its own: another process may train further experts meanwhile.
                with FileLock(folder / ".datasheet.lock"):
                    self._score(folder, own, base, cache_dir, progress=progress)
            except OSError as error:  # the experts are there, in a cache that is only read
                logger.warning("the datasheet in %s cannot be written: %s", folder, error)
        return folders

    def _train(
        self, folders: Mapping[str, Path], base: Path, *, progress: bool, every: float
    ) -> None:
        training = ExpertTraining(base, self.kind, self.tuning, self.seed)
        steps = {
            part.name: self.schedule(part).steps
            for part in self.data
            if read_network(training.file(folders[part.name])) is None
        }
        with training_shown(steps, progress=progress) as start:
            for part in self.data:
                folder = folders[part.name]
                folder.mkdir(exist_ok=True)
                self.prepare(part, folder, base)
                if part.name in steps:
                    training.train(
                        part.name,
                        folder,
                        self.loss(part, folder, base),
                        len(part.train),
                        self.schedule(part),
                        on_step=start(part.name),
                        every=every,
                    )

    def _score(
        self,
        folder: Path,
        own: Mapping[str, str],
        base: Path,
        cache_dir: str | Path | None,
        *,
        progress: bool,
    ) -> None:
        evaluators = {
            own[part.name]: self.evaluator(
                folder / own[part.name], base, min(self.size, len(part.test))
            )
            for part in self.data
        }
        sets = {
            own[part.name]: {
                **part.facts,
                "test": min(self.size, len(part.test)),
                "steps": self.schedule(part).steps,
                "texts": part.digest[:12],
            }
            for part in self.data
        }

        def score(network: str, names: Sequence[str]) -> dict[str, float]:
            expert = None if network == "base" else folder / network
            model = expert_model(base, self.kind, expert)
            for name in names:
                evaluators[name].prepare(model)
            found = {name: evaluators[name](model) for name in names}
            return {name: next(iter(seen.values())).value for name, seen in found.items()}

        name = self.model_name if self.model is None else base.name
        with training_shown(
            dict.fromkeys(("base", *self.sets), 1),
            progress=progress,
            doing="scoring",
            done="scored {count} networks for the datasheet",
        ) as start:
            complete_datasheet(
                folder,
                {"model": name, **self.settings(cache_dir)},
                sets,
                self.metric,
                score,
                on_network=lambda network: start(network)(),
            )


def held_out(folder: Path, size: int) -> Data:
    """Return the first ``size`` held-out texts of a set, with their labels, as an evaluator's data.

    Args:
        folder: Folder of the set, out of `TunedZoo.experts`.
        size: How many.
    """
    return Data(path=str(folder / _HELD_OUT), split=f"[:{size}]")


def _write_held_out(part: TextSelection, folder: Path) -> None:
    file = folder / _HELD_OUT
    if not file.is_file():
        rows = zip(part.test, part.test_labels, strict=True)
        lines = (json.dumps({"text": text, "label": label}) for text, label in rows)
        write_text(file, "".join(f"{line}\n" for line in lines))


class TunedProblem(MergedModelProblem):
    """The problem of merging a `TunedZoo`; made by :func:`tuned_problem`.

    Attributes:
        zoo: The experts.
        size: Number of held-out texts behind each metric.
        base: Folder of the model that the experts were fine-tuned from.
        folders: Set -> folder of its expert, and of what else belongs to the set.
    """

    def __init__(
        self,
        zoo: TunedZoo,
        size: int,
        *,
        base: Path,
        folders: Mapping[str, Path],
        description: Mapping[str, Any],
        **settings: Any,
    ) -> None:
        self.zoo = zoo
        self.size = size
        self.base = base
        self.folders = dict(folders)
        self._description = dict(description)
        self._measures = {
            name: zoo.evaluator(folder, base, size) for name, folder in folders.items()
        }
        super().__init__(
            partial(load_pretrained, base, zoo.kind),
            base=base,
            experts=self.folders,
            evaluators=self._measures,
            **settings,
        )

    def evaluator(self, name: str) -> ExampleEvaluator:
        """Return what measures the set ``name``."""
        return self._measures[name]

    def describe(self) -> dict[str, Any]:
        """Return the merged model's description, and that of the zoo."""
        zoo = {**self._description, "size": self.size}
        return {**super().describe(), "kind": self.zoo.name, "zoo": zoo}


def tuned_problem(
    zoo: TunedZoo,
    size: int,
    *,
    cache_dir: str | Path | None,
    progress: bool,
    max_memory: int | str | None,
    **settings: Any,
) -> TunedProblem:
    """Return the problem of merging a zoo, after training what is missing.

    Args:
        zoo: The experts.
        size: How many held-out texts an evaluation uses per set, the same every time.
        cache_dir: Where trained experts, and mapped task vectors, are kept.
        progress: Show a progress bar while training.
        max_memory: Cap of the memory for task vectors.
        settings: Further ones of `MergedModelProblem`.

    Raises:
        DataError: When a set has fewer held-out texts, and as `TunedZoo.experts`.
    """
    most = min(len(part.test) for part in zoo.data)
    size = whole_number(
        "size",
        size,
        least=1,
        most=most,
        error=DataError,
        hint=f"use from 1 to {most} held-out texts per set",
    )
    return TunedProblem(
        zoo,
        size,
        base=zoo.base(cache_dir),
        folders=zoo.experts(cache_dir, progress=progress),
        description=zoo.describe(cache_dir),
        max_memory=max_memory,
        # Without a cap this folder is for trained experts alone.
        cache_dir=None if max_memory is None else cache_dir,
        **settings,
    )
