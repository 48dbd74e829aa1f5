"""What a file seems to be by its first bytes, for files that are not what their name says."""

from __future__ import annotations

import codecs
from dataclasses import dataclass

__all__ = ["HEAD_BYTES", "Appearance", "appearance"]

HEAD_BYTES = 512
"""How much of a file's beginning `appearance` wants to see."""

_AGAIN = "download or copy the file again"
_LIMIT = 100_000_000


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


_MAGIC: tuple[tuple[bytes, Appearance], ...] = (
    (
        b"version https://git-lfs",
        Appearance(
            "lfs",
            "a git-lfs pointer, not the file that it stands for",
            "fetch the file itself, for example with `git lfs pull`",
        ),
    ),
    (b"GGUF", Appearance("gguf", "a GGUF file", "give the weights that it was converted from")),
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
_PAGE = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")


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
