"""Files of weights, read by position: no memory map, no shared file position, no open handle.

A file that changes after it was opened is refused. The first bytes of a file tell what it is where
its name says something else.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from map_bo.errors import CheckpointError, first_line

__all__ = ["GGUF_HINT", "HEAD_BYTES", "Appearance", "WeightFile", "appearance"]

HEAD_BYTES = 512
"""How much of a file's beginning `appearance` wants to see."""

_AGAIN = "download or copy the file again"
_LIMIT = 100_000_000
_PAGE = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")

# Linux reads at most 2 GiB at once.
_AT_ONCE = 1 << 30
_READ_AGAIN = "copy or download it again"

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class WeightFile:
    """A regular file that is read by position and refused once it has changed.

    Every read opens the file, so that thousands of shards hold no handles, several threads and
    forked processes read at once, and a file that was moved away is noticed. Plain reads keep
    the resident memory to what was asked for, where pages of a memory map count until it is
    closed, and a file that shrinks gives an error, where a map would end the process (SIGBUS).

    Size, inode and time of change must stay those of the first opening: pieces of an old and a
    new file must never be mixed. In another process, or on another machine (after pickling), the
    file must have the same size and the same sealed first bytes; then it is taken as it is there.

    Args:
        path: The file. Links are followed.

    Raises:
        CheckpointError: When there is none, it is not a regular file, or it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seal: tuple[int, bytes] | None = None
        descriptor = self._open()
        try:
            self._known: tuple[int, ...] | None = _state(os.fstat(descriptor))
            self.size = self._known[0]
        finally:
            os.close(descriptor)

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from ``start`` to ``stop``; fewer only where the file ends before."""
        stop = max(start, min(stop, self.size))
        content = bytearray(stop - start)
        self.read_into(memoryview(content), start)
        return bytes(content)

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill ``buffer`` with the bytes from ``start`` on.

        Raises:
            CheckpointError: When the file ends before, is gone, or has changed since it was
                opened; the buffer then holds nothing of value.
        """
        descriptor = self._open()
        try:
            known = self._known
            if known is None:
                known = self._recognise(descriptor)
            self._fill(descriptor, buffer, start)
            # Asked for after reading, so that a change meanwhile is seen as well.
            if _state(os.fstat(descriptor)) != known:
                raise self._change_error()
        finally:
            os.close(descriptor)

    def seal(self, length: int, content: bytes) -> None:
        """Remember the first ``length`` bytes, by which another process knows the file."""
        self._seal = (length, hashlib.sha256(content).digest())

    def version(self) -> tuple[int, ...]:
        """Return a value that changes when the file does: size, time of change, inode.

        Raises:
            CheckpointError: When it is gone.
        """
        try:
            return _state(self.path.stat())
        except OSError as error:
            raise self._unreadable(error) from error

    def require_unchanged(self) -> None:
        """Refuse a file that is gone or has changed since it was opened."""
        if self._known is not None and self.version() != self._known:
            raise self._change_error()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}

    def _open(self) -> int:
        try:
            # Before opening: to open a device can have effects, and a pipe would wait for a writer.
            kind = stat.S_IFMT(self.path.stat().st_mode)
            if kind != stat.S_IFREG:
                raise CheckpointError(
                    f"{self.path} cannot be read: it is {_KINDS.get(kind, 'a special file')}, "
                    "not a regular file",
                    hint="give a file of weights, or a folder that holds one",
                )
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            if self.path.is_symlink():
                raise CheckpointError(
                    f"{self.path} cannot be read: it is a link to {os.readlink(self.path)}, "
                    "which does not exist",
                    hint="the download or copy is incomplete; fetch the file again",
                ) from error
            raise self._unreadable(error) from error
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error

    def _recognise(self, descriptor: int) -> tuple[int, ...]:
        known = _state(os.fstat(descriptor))
        if known[0] != self.size:
            raise self._change_error()
        if self._seal is not None:
            length, digest = self._seal
            content = bytearray(length)
            self._fill(descriptor, memoryview(content), 0)
            if hashlib.sha256(content).digest() != digest:
                raise self._change_error()
        self._known = known
        return known

    def _fill(self, descriptor: int, buffer: memoryview, start: int) -> None:
        buffer = buffer.cast("B") if buffer.nbytes else buffer
        done = 0
        while done < buffer.nbytes:
            try:
                count = os.preadv(descriptor, [buffer[done : done + _AT_ONCE]], start + done)
            except OSError as error:
                raise self._unreadable(error) from error
            if count == 0:
                raise CheckpointError(
                    f"{self.path} cannot be read: it ends at byte {start + done}, and "
                    f"{buffer.nbytes - done} more were expected",
                    hint=f"the file was cut off after it was opened; {_READ_AGAIN}",
                )
            done += count

    def _change_error(self) -> CheckpointError:
        return CheckpointError(
            f"{self.path} cannot be read: it has changed since it was opened",
            hint="open the checkpoint again once nothing writes to the file",
        )

    def _unreadable(self, error: Exception) -> CheckpointError:
        said = getattr(error, "strerror", None) or first_line(error)
        return CheckpointError(
            f"{self.path} cannot be read: {said}",
            hint=f"check that the file is there and readable, or {_READ_AGAIN}",
        )


def _state(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_size, status.st_mtime_ns, status.st_ino)


@dataclass(frozen=True)
class Appearance:
    """What a file seems to be.

    Attributes:
        kind: Short name: ``safetensors``, ``zip``, ``pickle``, or another word.
        what: The same in words, with its article.
        hint: What to do about it.
    """

    kind: str
    what: str
    hint: str


GGUF_HINT = (
    "give the weights that it was converted from, or convert it to a Hugging Face folder: "
    "transformers.AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=NAME, "
    "quantization_config=transformers.GgufConfig(dequantize=True)).save_pretrained(OUT), and the "
    "same with AutoTokenizer, without quantization_config"
)
"""How to go on from a GGUF file, whose quantised blocks cannot be merged."""

_MAGIC: tuple[tuple[bytes, Appearance], ...] = (
    (
        b"version https://git-lfs",
        Appearance(
            "lfs",
            "a git-lfs pointer, not the file that it stands for",
            "fetch the file itself, for example with `git lfs pull`",
        ),
    ),
    (b"GGUF", Appearance("gguf", "a GGUF file", GGUF_HINT)),
    (
        b"\x89HDF\r\n",
        Appearance("hdf5", "an HDF5 file, as Keras writes", "convert it to safetensors"),
    ),
    (b"\x93NUMPY", Appearance("npy", "a NumPy array", "save the named tensors as safetensors")),
    (b"\x1f\x8b", Appearance("gzip", "a gzip archive", "unpack it first")),
    (b"BZh", Appearance("bzip2", "a bzip2 archive", "unpack it first")),
    (b"\xfd7zXZ", Appearance("xz", "an xz archive", "unpack it first")),
    (b"\x28\xb5\x2f\xfd", Appearance("zstd", "a zstd archive", "unpack it first")),
    (b"7z\xbc\xaf", Appearance("7z", "a 7z archive", "unpack it first")),
)
_ZIP = Appearance("zip", "a zip archive, as torch.save writes", "rename it to .pt")
_PICKLE = Appearance("pickle", "a pickle, as torch.save once wrote", "rename it to .pt")
_SAFETENSORS = Appearance("safetensors", "a safetensors file", "rename it to .safetensors")


def appearance(head: bytes) -> Appearance | None:
    """Return what a file seems to be, or None where nothing is recognised.

    Args:
        head: Its first `HEAD_BYTES` bytes, or all of a shorter file.
    """
    if not head:
        return Appearance("empty", "an empty file", _AGAIN)
    # First: the length of a header can begin like another format (640 is how a pickle begins),
    # and no other format has zeros and a brace there.
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= _LIMIT:
        return _SAFETENSORS
    for magic, found in _MAGIC:
        if head.startswith(magic):
            return found
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _ZIP
    if head[0] == 0x80 and len(head) > 1 and 2 <= head[1] <= 5:
        return _PICKLE
    if head[257:262] == b"ustar":
        return Appearance("tar", "a tar archive", "unpack it first")
    if not head.strip(b"\0"):
        return Appearance("zeros", "zeros, as a download cut off leaves", _AGAIN)
    return _text(head)


def _text(head: bytes) -> Appearance | None:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.lower().startswith(_PAGE):
        return Appearance(
            "html",
            "an HTML or XML page, perhaps an error or log-in page saved in the file's place",
            "open its address in a browser to see what is wrong, then " + _AGAIN,
        )
    try:
        # A character may be cut in two at the end of the head; the decoder waits for the rest.
        text = codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return None
    if not text or any(not c.isprintable() and c not in "\r\n\t" for c in text):
        return None
    if text[0] in "{[":
        return Appearance("json", "JSON text", _AGAIN)
    first = text.splitlines()[0][:60]
    return Appearance("text", f"text that begins with {first!r}", _AGAIN)
