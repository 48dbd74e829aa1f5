"""One merged model on disk: merged from checkpoints, and written with its recipe.

What is written is a folder that appears whole or not at all: the weights, the base's other files,
the recipe, the same merge for mergekit, and a model card.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from map_bo.errors import MergeError, listed
from map_bo.merging.adapters.adapter import open_expert
from map_bo.merging.align.conform import MissingRule, align_experts
from map_bo.merging.align.experts import note_untied, require_distinct
from map_bo.merging.align.layout import join_ties
from map_bo.merging.align.vocabulary import VocabularyRule
from map_bo.merging.checkpoints.checkpoint import Checkpoint, CheckpointSource, open_checkpoint
from map_bo.merging.checkpoints.read_sharded import require_inside
from map_bo.merging.checkpoints.tensors import DTYPES, Layout
from map_bo.merging.export.bounded import Merge, merge_bounded
from map_bo.merging.export.carried import find_carried, weight_stem
from map_bo.merging.export.draft import publish, refuse_existing, remove_stale_drafts, writing_draft
from map_bo.merging.export.mergekit_config import mergekit_text
from map_bo.merging.export.model_card import MODEL_CARD, model_card_text
from map_bo.merging.export.recipe import RECIPE, plain, recipe_text
from map_bo.merging.export.task import TaskModel
from map_bo.merging.export.write_shards import (
    Advance,
    Pieces,
    merging_bar,
    write_weights,
    writing,
)
from map_bo.merging.vectors.blocks import with_known_blocks
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.operator import (
    ChecksValues,
    MergeOperator,
    Weights,
    chosen_merge,
    recipe_of,
)
from map_bo.merging.vectors.parallel import parallel_for
from map_bo.merging.vectors.storage import parse_bytes
from map_bo.space import CoefficientSpace

__all__ = [
    "ExportSettings",
    "digest_all",
    "export_model",
    "merge_checkpoints",
    "require_space",
    "write_model",
]

_HEADROOM = 1 << 20
_READ_BACK = "Every tensor was read back from the files as it was merged, to the bit."


@dataclass(frozen=True)
class ExportSettings:
    """How a merged model is written.

    Attributes:
        max_memory: Bytes of resident memory that the process may have in all while it merges from
            files, or text such as ``"2GB"``; None leaves the size of pieces to the operator (some
            hundred MB in all). Files of ``torch.save`` are mapped by torch: what was read of them
            is resident too, until the system takes it back. Statistics that an operator merges by
            and adapters' factors are held.
        shard_size: Largest size of one weight file, in bytes or such text.
        progress: Show a progress bar.
        task: Expert whose task head the model gets, with that expert's names and configuration;
            None writes the merge like the base.
        code: Whether to carry the base's Python code, which loading with ``trust_remote_code``
            runs.

    Raises:
        MergeError: When a size is none.
    """

    max_memory: int | str | None = None
    shard_size: int | str = "5GB"
    progress: bool = False
    task: str | None = None
    code: bool = False

    def __post_init__(self) -> None:
        if self.max_memory is not None:
            object.__setattr__(self, "max_memory", parse_bytes(self.max_memory, "max_memory"))
        object.__setattr__(self, "shard_size", parse_bytes(self.shard_size, "shard_size"))

    @property
    def memory(self) -> int | None:
        """The bound of the memory in bytes, if there is one."""
        return None if self.max_memory is None else int(self.max_memory)

    @property
    def shard_bytes(self) -> int:
        """The largest size of one weight file in bytes."""
        return int(self.shard_size)


def merge_checkpoints(
    base: CheckpointSource,
    experts: Mapping[str, CheckpointSource],
    coefficients: Mapping[str, float | str],
    out: str | Path,
    *,
    operator: MergeOperator | None = None,
    max_memory: int | str | None = None,
    shard_size: int | str = "5GB",
    ties: Mapping[str, str] | None = None,
    check_base: bool = True,
    vocabulary: VocabularyRule | None = None,
    missing: MissingRule = "refuse",
    task: str | None = None,
    record: Mapping[str, Any] | None = None,
    progress: bool = True,
    code: bool = False,
) -> Path:
    """Merge checkpoints that need not fit into memory, and write the merged one.

    Tensors are read, merged and written piece by piece on all cores, summed in float32 whatever
    the storage, and rounded once to the base's dtype. (Linear merges of float64 and complex
    tensors keep their precision and go tensor by tensor, on one core.) What is written, and how,
    is said at `write_model`.

    Args:
        base: The model that the experts were fine-tuned from; see `open_checkpoint`.
        experts: Expert name -> checkpoint, or LoRA adapter over the base.
        coefficients: Coefficient name -> value: the experts' names, or ``expert/block`` with
            blocks, and the settings that the operator searches. One that is left out is 0.
        out: Folder to create.
        operator: How to merge; task arithmetic by default.
        max_memory: See `ExportSettings`.
        shard_size: See `ExportSettings`.
        ties: Further ties of the base, alias -> canonical name, that its files do not record.
        check_base: Whether to refuse experts that do not look fine-tuned from the base.
        vocabulary: What to do with experts whose embeddings have other rows than the base's:
            refuse them (default), or match rows by position (``"base"``) or by token
            (``"tokens"``); see `map_bo.merging.align.vocabulary.fit_vocabulary`.
        missing: What to do with experts that lack tensors of the base: refuse them, or leave those
            tensors as they are in the base (``"base"``); see `align_experts`, which also says how
            prefixes, buffers and task heads are read. Heads are not part of the merge.
        task: Expert whose task head the model gets; see `ExportSettings`.
        record: Further plain data for the recipe.
        progress: Show a progress bar.
        code: See `ExportSettings`.

    Returns:
        The absolute path of the folder.

    Raises:
        MergeError: When the inputs do not fit each other, or memory or disk do not suffice.
        CheckpointError: When a file cannot be read.
    """
    settings = ExportSettings(max_memory, shard_size, progress, task, code)
    refuse_existing(out)
    if not experts:
        raise MergeError("there are no experts", hint="give at least one fine-tuned model")
    operator = TaskArithmetic() if operator is None else operator
    opened = open_checkpoint(base)
    given = {name: open_expert(source, opened) for name, source in experts.items()}
    checkpoints = align_experts(given, opened, vocabulary=vocabulary, missing=missing)
    joined = join_ties(opened, ties or {})
    require_distinct(opened, checkpoints, joined)
    operator = with_known_blocks(operator, opened, checkpoints)
    space = operator.space(tuple(checkpoints), lower=0.0, upper=1.0)
    c = _check_values(operator, space, coefficients)
    operator, names, c = chosen_merge(operator, checkpoints, space.names, c)
    merge = Merge(
        base=opened,
        experts=checkpoints,
        operator=operator,
        names=names,
        c=c,
        ties=joined,
        check_base=check_base,
    )
    return export_model(merge, out, settings=settings, record=record)


def _check_values(
    operator: MergeOperator, space: CoefficientSpace, given: Mapping[str, float | str]
) -> Tensor:
    """Return the coefficients of a merge, ``d``, checked.

    Raises:
        MergeError: When one is unknown, missing, or no value that the operator takes.
    """
    unknown = [name for name in given if name not in space.names]
    if unknown:
        raise MergeError(
            f"there are no coefficients {listed(map(repr, unknown))}",
            hint=f"this merge takes {listed(space.names, 20)}",
        )
    if space.choice is not None and space.choice.name in given:
        # By name too; what another option would search is not asked for.
        code = space.choice.code(given[space.choice.name])
        rest = space.choice.alone(code, dict(zip(space.settings, space.defaults, strict=True)))
        given = {**given, **rest}
    lacking = [name for name in space.settings if name not in given]
    if lacking:
        raise MergeError(
            f"no value is given for {listed(lacking)}",
            hint="give every setting that the operator searches",
        )
    wrong = [n for n, v in given.items() if isinstance(v, str) or not math.isfinite(v)]
    if wrong:
        raise MergeError(
            f"the coefficients {listed(wrong)} must be finite, got "
            f"{listed(str(given[name]) for name in wrong)}",
            hint="give finite numbers",
        )
    values = {name: float(given.get(name, 0.0)) for name in space.names}
    if isinstance(operator, ChecksValues):
        operator.check_values(values)
    return torch.tensor(list(values.values()), dtype=torch.float64)


def export_model(
    merge: Merge,
    out: str | Path,
    *,
    settings: ExportSettings | None = None,
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Make the tensors of a merge and write them as a model; see `write_model`.

    Args:
        merge: The merge.
        out: Folder to create.
        settings: Bounds of memory and file sizes.
        record: Further plain data for the recipe.

    Returns:
        The absolute path of the folder.

    Raises:
        MergeError: When it cannot be made or written; nothing is left behind.
    """
    settings = settings or ExportSettings()
    base, recalibrated = merge.base, merge.recalibrated
    tensors = merge_bounded(merge, settings.memory)
    if settings.task is not None:
        base = TaskModel(merge.base, merge.experts, settings.task)
        tensors, recalibrated = base.fill(tensors), base.rename(recalibrated)
    with merging_bar(base, shown=settings.progress) as advance:
        return write_model(
            out,
            tensors=tensors,
            base=base,
            experts=merge.experts,
            operator=recipe_of(merge.operator),
            coefficients=merge.coefficients,
            record=record,
            shard_bytes=settings.shard_bytes,
            weights=merge.weights,
            recalibrated=recalibrated,
            ties=merge.ties,
            advance=advance,
            code=settings.code,
        )


def write_model(
    out: str | Path,
    *,
    tensors: Iterable[tuple[str, Tensor]] | Pieces,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    operator: Mapping[str, Any],
    coefficients: Mapping[str, float],
    record: Mapping[str, Any] | None = None,
    shard_bytes: int = 5_000_000_000,
    weights: Weights | None = None,
    recalibrated: Mapping[str, Tensor] | None = None,
    ties: Mapping[str, str] | None = None,
    advance: Advance | None = None,
    code: bool = False,
) -> Path:
    """Write a merged model as a folder that transformers, mergekit and `open_checkpoint` read.

    What was written is read back and compared with what was merged before the folder appears.

    The folder appears whole or not at all: everything goes to a hidden folder beside it, is
    forced to the disk, and is renamed at the end. What a killed export to the same folder left
    hidden is removed by the next one; an export that still runs is left alone. It holds

    - ``model.safetensors``, or shards with ``model.safetensors.index.json``, or the name by which
      the base's library finds them (``diffusion_pytorch_model``). Each tensor has the
      base's name, shape and dtype (values of another floating dtype are rounded to it). A tied
      tensor is written once, under its canonical name, as transformers does, and the metadata
      name its aliases as ``alias: canonical``, as safetensors' ``save_model`` does;
    - of a base that is a Hugging Face directory, what makes it load where the base does:
      configuration, tokenizer, processors, chat templates, licences, and the folders that its JSON
      files name, such as the pooling of sentence-transformers; see
      `map_bo.merging.export.carried.find_carried`. Python code is carried where ``code`` says so,
      and the log and the card name what is not;
    - ``recipe.yaml``: all inputs with their digests, operator, coefficients, versions, ``record``;
    - ``mergekit.yaml``: the same merge for mergekit, or a comment that says why there is none;
    - ``README.md``: a model card with what was merged, how, and the metrics in ``record``. That of
      the base is not carried.

    Args:
        out: Folder to create; it may exist only when it is empty.
        tensors: All tensors of the merged model, in any order, for example from
            `merge_bounded`, where at most the tied ones are held in memory; or a function that
            puts them piece by piece, see `Pieces`.
        base: The base checkpoint: it says which tensors there must be.
        experts: Name -> checkpoint.
        operator: The merge operator as plain data.
        coefficients: Coefficient name -> value.
        record: Further plain data for the recipe, such as the run and the predicted metrics.
        shard_bytes: Largest size of one weight file, in bytes.
        weights: Tensor name -> weight of each expert, where the merge is linear: it lets
            ``mergekit.yaml`` express coefficients that differ between tensors. Without it, the
            coefficients must be one for each expert to be expressible.
        recalibrated: Tensors, by name, that take the place of merged ones: the statistics of
            batch normalisation that were measured anew. Names that the base lacks are passed over.
        ties: Further ties of the base, alias -> canonical name, that the merge went by; for the
            recipe.
        advance: Called with a number of elements whenever they are written, from any thread.
        code: Whether to carry the base's Python code, which loading with ``trust_remote_code``
            runs.

    Returns:
        The absolute path of the folder.

    Raises:
        MergeError: When the folder is not empty, the disk is full or not writable, or the tensors
            are not those of the base; nothing is left behind.
    """
    target = refuse_existing(out)
    if shard_bytes < 1:
        raise MergeError(
            f"shard_bytes must be at least 1, got {shard_bytes}", hint="give a number of bytes"
        )
    further = plain(record or {})  # fails before anything is written
    layouts = {name: base.layout(name) for name in base.names if name not in base.ties}
    unwritable = [name for name, layout in layouts.items() if layout.dtype not in DTYPES.values()]
    if unwritable:
        raise MergeError(
            f"safetensors has no dtype for {listed(unwritable)}",
            hint="convert the base and the experts to float32",
        )
    carried = find_carried(base, experts, code=code)
    folders = [c.directory for c in (base, *experts.values()) if c.directory is not None]
    for file in carried.files.values():
        # A model from somebody else must not publish a file of this machine.
        require_inside(file, next((f for f in folders if file.is_relative_to(f)), file.parent))
    notes = [*carried.notes, *note_untied(base)]
    with writing(target):
        remove_stale_drafts(target)
        require_space(target, layouts, carried.files.values())
    measured = {n: t for n, t in (recalibrated or {}).items() if n in base.names}
    further_ties = {a: kept for a, kept in (ties or {}).items() if base.ties.get(a) != kept}
    with ExitStack() as stack:
        with writing(target):
            draft = stack.enter_context(writing_draft(target))
        meant = write_weights(
            draft,
            tensors,
            layouts,
            base,
            shard_bytes,
            instead=measured,
            advance=advance,
            stem=weight_stem(base),
        )
        for name, file in carried.files.items():
            with writing(target):
                copied = draft / name
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copied)
        written = open_checkpoint(draft)
        meant.compare(written)
        digest_all([base, *experts.values(), written])
        recipe = recipe_text(
            base=base,
            experts=experts,
            operator=operator,
            coefficients=coefficients,
            # Read back from the file: a recipe never vouches for weights that cannot be opened.
            merged={
                "sha256": written.digest(),
                **({"recalibrated": sorted(measured)} if measured else {}),
                **({"ties": further_ties} if further_ties else {}),
            },
            record=further,
        )
        mergekit = mergekit_text(
            base=base,
            experts=experts,
            operator=operator,
            coefficients=coefficients,
            weights=weights,
            recalibrated=bool(measured),
        )
        card = model_card_text(
            base=base,
            experts=experts,
            operator=plain(operator),
            coefficients=coefficients,
            record=further,
            recalibrated=bool(measured),
            notes=[
                *notes,
                "Every tensor was read back from the files as it was merged, to the bit.",
            ],
        )
        with writing(target):
            (draft / MODEL_CARD).write_text(card, encoding="utf-8")
            (draft / RECIPE).write_text(recipe, encoding="utf-8")
            (draft / "mergekit.yaml").write_text(mergekit, encoding="utf-8")
            publish(draft, target)
    return target


def require_space(
    target: Path, layouts: Mapping[str, Layout], further: Iterable[Path] = ()
) -> None:
    """Refuse a disk without room for tensors and copies of further files.

    Raises:
        MergeError: When there is too little space.
    """
    needed = sum(layout.nbytes for layout in layouts.values())
    needed += sum(file.stat().st_size for file in further) + _HEADROOM
    folder = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise MergeError(
            f"the merged model needs {needed / 1e9:.3f} GB, and {folder} has {free / 1e9:.3f} GB "
            "free",
            hint="free some space or export to another disk",
        )


def digest_all(checkpoints: Sequence[Checkpoint]) -> None:
    """Compute the digests of checkpoints on all cores; each is then kept by its checkpoint.

    Raises:
        CheckpointError: When a file cannot be read.
    """

    def digest(checkpoint: Checkpoint, _: None) -> None:
        checkpoint.digest()

    parallel_for(digest, checkpoints, lambda: None)
