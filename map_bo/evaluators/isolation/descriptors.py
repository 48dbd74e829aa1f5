"""Files of the process that an evaluation may lose: its directory and its standard streams."""

from __future__ import annotations

import contextlib
import os
from copy import copy

__all__ = ["Directory", "Streams"]


class _Held:
    """A descriptor of our own of some file, to find it again by.

    An evaluator may close descriptors that it has not opened, as programs do that turn into
    daemons, and the number may then be that of another file: it is used and closed only while it
    is still the same one.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.was = os.fstat(descriptor)

    def now(self) -> int | None:
        """Return the descriptor, or None where somebody has closed it."""
        return self._descriptor if self.is_at(self._descriptor) else None

    def is_at(self, where: int | str) -> bool:
        """Return whether a descriptor or a path leads to the file."""
        try:
            return os.path.samestat(os.stat(where), self.was)
        except OSError:
            return False

    def copy(self) -> _Held | None:
        """Return another descriptor of the file, to be closed on its own."""
        descriptor = self.now()
        return None if descriptor is None else _Held(os.dup(descriptor))

    def close(self) -> None:
        """Close the descriptor, unless somebody has."""
        if self.now() is not None:
            os.close(self._descriptor)


class Directory:
    """The working directory, found again also after it was renamed."""

    _held: _Held | None

    def __init__(self) -> None:
        self._held = None
        with contextlib.suppress(OSError):  # it is gone already, or may not be read
            self._path = os.getcwd()
            self._held = _Held(os.open(".", os.O_RDONLY))

    def copy(self) -> Directory:
        """Return the same directory, to be closed on its own."""
        other = copy(self)
        if self._held is not None:
            other._held = self._held.copy()
        return other

    def restore(self) -> str | None:
        """Go back to it; return why that failed, if it did."""
        held, self._held = self._held, None
        if held is None:
            return None
        try:
            descriptor = held.now()
            if descriptor is not None and held.was.st_nlink and not os.fstat(descriptor).st_nlink:
                return "the working directory (it was deleted)"
            if not held.is_at("."):
                os.chdir(self._path if descriptor is None else descriptor)
        except OSError as error:
            return f"the working directory ({error.strerror})"
        finally:
            held.close()
        return None


class Streams:
    """What the descriptors of standard input, output and error lead to."""

    def __init__(self) -> None:
        self._held: dict[int, _Held] = {}
        for number in range(3):
            with contextlib.suppress(OSError):  # it is closed already
                self._held[number] = _Held(os.dup(number))

    def copy(self) -> Streams:
        """Return the same streams, to be closed on their own."""
        other = copy(self)
        made = {number: held.copy() for number, held in self._held.items()}
        other._held = {number: held for number, held in made.items() if held is not None}
        return other

    def restore(self) -> str | None:
        """Make them lead there again; return why that failed, if it did."""
        lost = []
        for number, held in self._held.items():
            descriptor = held.now()
            if not held.is_at(number):
                try:
                    if descriptor is None:
                        raise OSError("its descriptors were closed")
                    os.dup2(descriptor, number)
                except OSError as error:
                    lost.append(f"descriptor {number} ({error.strerror or error})")
            held.close()
        self._held = {}
        return ", ".join(lost) or None
