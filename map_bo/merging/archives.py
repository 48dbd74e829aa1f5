"""The zip archives of torch.save: checked before torch maps them."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections import Counter
from pathlib import Path

from map_bo.errors import CheckpointError
from map_bo.merging.messages import first_line
from map_bo.merging.weight_file import WeightFile

__all__ = ["data_sizes"]

_LOCAL = struct.Struct("<4s5H3I2H")
_DESCRIPTOR = b"PK\x07\x08"
_DESCRIBED_BEHIND = 1 << 3
_ENCRYPTED = 1 << 0
_PICKLE_LIMIT = 1 << 28


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
            return _checked(file, archive.infolist())
    except CheckpointError:
        raise
    # A damaged archive can raise nearly anything, from struct.error to NotImplementedError.
    except Exception as error:
        raise CheckpointError(
            f"{file.path} cannot be read: {first_line(error)}",
            hint="the file is truncated, damaged or not written by torch.save; fetch it again",
        ) from error


def _checked(file: WeightFile, records: list[zipfile.ZipInfo]) -> Counter[int]:
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
