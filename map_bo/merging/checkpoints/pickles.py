"""State dicts in pickles: read with torch's restricted unpickler, which runs no code.

The zip archives that torch.save writes are checked before torch maps them.
"""

from __future__ import annotations

import builtins
import re
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from map_bo.errors import CheckpointError, first_line, listed
from map_bo.merging.checkpoints.positioned_reads import HEAD_BYTES, WeightFile, appearance
from map_bo.merging.checkpoints.tensors import MemoryReader

__all__ = ["PickleReader", "data_sizes", "state_dict"]

_LOCAL = struct.Struct("<4s5H3I2H")
_DESCRIPTOR = b"PK\x07\x08"
_DESCRIBED_BEHIND = 1 << 3
_ENCRYPTED = 1 << 0
_PICKLE_LIMIT = 1 << 28

# The keys under which training scripts keep the state dict beside optimiser state and counters.
NESTED_KEYS = (
    "state_dict",  # Lightning
    "model_state_dict",
    "model",
    "module",  # DeepSpeed
    "net",
    "network",
    "params",
    "weights",
    # Averages of the weights, where they stand alone.
    "ema",
    "ema_state_dict",
    "state_dict_ema",
    "model_ema",
    "ema_model",
    "params_ema",
)

# What a file may look like when torch is to read it; the tar is torch's oldest format, and gets
# torch's own words. A file that looks like nothing may be a pickle cut or damaged at its start.
_FOR_TORCH = {"zip", "pickle", "tar"}
# An expanded tensor repeats few elements; only one that claims absurdly many is refused.
_EXPANDED_LIMIT = 1 << 28


class PickleReader(MemoryReader):
    """The state dict of a ``.pt``, ``.pth`` or ``.bin`` file, read without running its code.

    The file may hold the state dict itself or a dict with one under a usual key
    (``state_dict``, ``model``, ``module``, ``ema`` and so on; see `state_dict`). Files in torch's
    zip format are memory-mapped by torch, so what was read of them counts as resident memory while
    the checkpoint is open; older files are held in memory. Only safetensors files are read with
    bounded memory.

    A mapped file that shrinks would end the process, so each read first looks whether the file is
    still the one that was opened; one cut off in the very moment of reading is not noticed.

    Raises:
        CheckpointError: For a file that is damaged, would run code, or holds no state dict.
    """

    def __init__(self, path: Path) -> None:
        file = WeightFile(path)
        tensors, mapped = _read_pickle(file)
        super().__init__(tensors, origin=str(path))
        # A copy in another process is given the tensors themselves and needs no file.
        self._file = file if mapped else None

    def load(self, name: str) -> Tensor:
        """Return one tensor, mapped or in memory."""
        if self._file is not None:
            self._file.require_unchanged()
        return super().load(name)

    def read(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return the elements from ``start`` to ``stop``, mapped or in memory, or in ``out``."""
        if self._file is not None:
            self._file.require_unchanged()
        return super().read(name, start, stop, out)

    def version(self) -> object | None:
        """Return the file's state and torch's own write counters."""
        counters = super().version()
        if counters is None or self._file is None:
            return counters
        return (self._file.version(), counters)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


def _read_pickle(file: WeightFile) -> tuple[dict[str, Tensor], bool]:
    """Return the tensors, and whether they are mapped."""
    path = file.path
    seen = appearance(file.read(0, HEAD_BYTES))
    if seen is not None and seen.kind not in _FOR_TORCH:
        raise CheckpointError(
            f"{path} cannot be read: by its beginning it is {seen.what}, not a file of torch.save",
            hint=seen.hint,
        )
    mapped = seen is not None and seen.kind == "zip"
    sizes = data_sizes(file) if mapped else None
    try:
        with warnings.catch_warnings():
            # torch warns of pickles that it did not write; what it cannot read, it refuses.
            warnings.simplefilter("ignore")
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    # A damaged pickle can raise nearly anything, from EOFError to UnicodeDecodeError.
    except Exception as error:
        unsafe = _would_run(path, str(error))
        if unsafe:
            raise CheckpointError(
                f"{path} was refused: {unsafe}",
                hint="convert it to safetensors in a place you trust, or save model.state_dict() "
                "alone: hyper_parameters, optimizers and settings beside it need code",
            ) from error
        raise CheckpointError(
            f"{path} cannot be read: {_pickle_problem(error)}",
            hint="the file is truncated, damaged or not written by torch.save; fetch it again",
        ) from error
    file.require_unchanged()
    tensors = state_dict(content, origin=str(path))
    _require_held(tensors, file, sizes)
    return tensors, mapped


def _require_held(
    tensors: Mapping[str, Tensor], file: WeightFile, sizes: Counter[int] | None
) -> None:
    """Refuse tensors that the file does not hold: torch takes the pickle's word for sizes."""
    storages: dict[int, int] = {}
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            continue  # refused in general
        storage = tensor.untyped_storage()
        if storage.nbytes():
            storages[storage.data_ptr()] = storage.nbytes()
        nbytes = tensor.numel() * tensor.element_size()
        if nbytes > max(storage.nbytes(), _EXPANDED_LIMIT):
            raise CheckpointError(
                f"{file.path}: tensor {name!r} has {nbytes} bytes by its shape, and the file "
                f"{storage.nbytes()} for it",
                hint="it is damaged, or an expanded tensor: save it with .contiguous()",
            )
    if sizes is not None and Counter(storages.values()) - sizes:
        raise CheckpointError(
            f"{file.path} cannot be read: tensors and the records of the archive differ in size",
            hint="the file is damaged or not written by torch.save; fetch it again",
        )


def _would_run(path: Path, problem: str) -> str | None:
    """Return why a pickle that torch refused is unsafe, or None when it is only damaged."""
    for pattern in (
        r"Unsupported global: GLOBAL (\S+)",
        r"Trying to (?:load unsupported GLOBAL|instantiate|call|set) (\S+)",
        r"Unsupported class (\S+)",
    ):
        found = re.search(pattern, problem)
        # A name that is neither dotted nor a builtin is a pickle cut off in the middle of it.
        if found and (re.search(r"\w\.\w", found.group(1)) or hasattr(builtins, found.group(1))):
            return f"it is a pickle that would run code ({found.group(1)})"
    with path.open("rb") as file:
        start = file.read(2)
    # torch.save writes protocol 2; a plain pickle.dump writes a later one.
    if len(start) == 2 and start[0] == 0x80 and start[1] > 2:
        return "it is a plain pickle, not written by torch.save, and could run code"
    return None


def _pickle_problem(error: Exception) -> str:
    # The first line of torch's message advises to load without weights_only; it is left out.
    found = re.search(r"WeightsUnpickler error:\s*(\S[^\n]*)", str(error))
    if found:
        return found.group(1)[:300]
    if str(error).startswith("Weights only load failed"):
        return "it is not a pickle of tensors"
    return first_line(error)


def state_dict(content: object, *, origin: str) -> dict[str, Tensor]:
    """Return the tensors of a state dict, or of the one nested in a training checkpoint.

    Nested ones are looked for under the usual keys, in the order of `NESTED_KEYS` (weights before
    their averages), and then under any other, where there is exactly one.

    Entries named ``*_extra_state`` that are not tensors are left out: modules use them for
    private settings that are not weights.

    Raises:
        CheckpointError: When there is no state dict, or it holds other things than tensors.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{origin} holds a {type(content).__name__}, not a state dict",
            hint="save model.state_dict()",
        )
    if not all(isinstance(value, Tensor) for value in content.values()):
        key = _nested_key(content)
        if key is not None:
            return state_dict(content[key], origin=f"{origin}[{key!r}]")
    tensors = {
        name: value
        for name, value in content.items()
        if isinstance(value, Tensor) or not str(name).endswith("_extra_state")
    }
    strange = [
        repr(name)
        for name, value in tensors.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if strange:
        raise CheckpointError(
            f"{origin} is not a state dict of names and tensors; see the "
            f"entr{'y' if len(strange) == 1 else 'ies'} {listed(strange)}",
            hint="give model.state_dict(), or a dict that holds it under 'state_dict' or 'model'",
        )
    return tensors


def _nested_key(content: Mapping[Any, Any]) -> str | None:
    """Return the key of the state dict in a training checkpoint, or None."""
    for key in NESTED_KEYS:
        if _may_be_state(content.get(key)):
            return key
    if any(isinstance(value, Tensor) for value in content.values()):
        return None  # a state dict with something else in it
    found = [
        key
        for key, value in content.items()
        if isinstance(key, str)
        and isinstance(value, Mapping)
        and value
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    ]
    return found[0] if len(found) == 1 else None


def _may_be_state(value: object) -> bool:
    """Return whether there are tensors in a mapping, or in one within it: settings have none."""
    if not isinstance(value, Mapping):
        return False
    inner = [value, *(value[key] for key in NESTED_KEYS if isinstance(value.get(key), Mapping))]
    return any(isinstance(each, Tensor) for part in inner for each in part.values())


class _Wrong(Exception):
    """What is wrong with an archive."""


def data_sizes(file: WeightFile) -> Counter[int]:
    """Check an archive of torch.save and return the sizes in bytes of its data records.

    torch maps the file and takes each record from where the archive says it is, without looking
    at checksums. Hence: every record is stored as it is (compressed ones could unpack to any
    size), lies in the file where both of its headers say, and overlaps no other; and the small
    records, the pickle among them, have their checksums. Those of the data are not computed,
    since that would read the whole file.

    Raises:
        CheckpointError: For an archive that is damaged or not of torch.save.
    """
    try:
        if not zipfile.is_zipfile(file.path):
            raise _Wrong("it is a zip archive, as torch.save writes, that is cut off")
        with zipfile.ZipFile(file.path) as archive:
            return _check_records(file, archive.infolist())
    except CheckpointError:
        raise
    # A damaged archive can raise nearly anything, from struct.error to NotImplementedError.
    except Exception as error:
        raise CheckpointError(
            f"{file.path} cannot be read: {first_line(error)}",
            hint="the file is truncated, damaged or not written by torch.save; fetch it again",
        ) from error


def _check_records(file: WeightFile, records: list[zipfile.ZipInfo]) -> Counter[int]:
    sizes: Counter[int] = Counter()
    names: set[str] = set()
    end = 0
    records = sorted(records, key=lambda record: record.header_offset)
    # zipfile forgives bytes before an archive and shifts all records; torch does not.
    if not records or records[0].header_offset != 0:
        raise _Wrong("its first record is not where the archive says")
    for record in records:
        shown = f"the record {record.filename[:200]!r}"
        if record.filename in names:
            raise _Wrong(f"it holds {shown} twice")
        names.add(record.filename)
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise _Wrong(f"{shown} is compressed, which torch.save never does")
        if record.flag_bits & _ENCRYPTED:
            raise _Wrong(f"{shown} is encrypted")
        begin = _data_begin(file, record, shown)
        if record.header_offset < end or begin + record.file_size > file.size:
            raise _Wrong(f"{shown} does not lie in the archive by itself")
        end = begin + record.file_size
        if record.flag_bits & _DESCRIBED_BEHIND and file.read(end, end + 4) != _DESCRIPTOR:
            raise _Wrong(f"{shown} is not where the archive says")
        parts = Path(record.filename).parts
        if len(parts) == 3 and parts[1] == "data":
            sizes[record.file_size] += 1
        else:
            _require_checksum(file, record, begin, shown)
    return sizes


def _data_begin(file: WeightFile, record: zipfile.ZipInfo, shown: str) -> int:
    """Return where a record's bytes begin: behind its own header, which repeats its name."""
    start = record.header_offset
    header = file.read(start, start + _LOCAL.size)
    if len(header) < _LOCAL.size:
        raise _Wrong(f"{shown} does not lie in the archive")
    name_length: int
    extra_length: int
    magic, *_, name_length, extra_length = _LOCAL.unpack(header)
    name = file.read(start + _LOCAL.size, start + _LOCAL.size + name_length)
    if magic != b"PK\x03\x04" or name != record.orig_filename.encode(
        "utf-8" if record.flag_bits & 0x800 else "cp437"
    ):
        raise _Wrong(f"{shown} is not where the archive says")
    return start + _LOCAL.size + name_length + extra_length


def _require_checksum(file: WeightFile, record: zipfile.ZipInfo, begin: int, shown: str) -> None:
    if record.file_size > _PICKLE_LIMIT:
        raise _Wrong(f"{shown} has {record.file_size} bytes, and is not data of a tensor")
    # torch.save writes zero where checksums were switched off.
    if record.CRC and zlib.crc32(file.read(begin, begin + record.file_size)) != record.CRC:
        raise _Wrong(f"{shown} does not have its checksum")
