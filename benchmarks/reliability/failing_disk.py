"""A disk that fails at the k-th thing asked of it: every call of the system that a save makes, each write included.

Functions of `os` and files opened for writing are replaced while it is entered. A file's writes are those that reach
the system, below Python's buffer.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal
from unittest.mock import patch

How = Literal["refused", "full", "reported late", "death before", "death within", "death after"]
"""What happens at the k-th call: it fails, once or as all writes after it; it fails though it was done; or the process
dies before it, in the middle of what it writes, or after it, and nothing reaches the disk any more."""

CALLS = ("mkdir", "open", "fsync", "close", "replace", "rename", "unlink")
"""Functions of `os` that are counted, beside opening a file for writing, its writes and truncations."""


class Death(BaseException):
    """What nothing catches."""


class FailingDisk:
    """A disk that fails once.

    Args:
        at: Number of the call that fails, from 0; one that is never reached fails nothing.
        how: What happens there.
    """

    def __init__(self, at: int, how: How) -> None:
        self.calls: Counter[str] = Counter()
        self.failed = self.dead = False
        self._at, self._how = at, how
        self._patches = ExitStack()
        self._open, self._close = io.open, os.close
        self._files: list[io.FileIO] = []

    def __enter__(self) -> FailingDisk:
        """Put the disk in the place of the real one."""
        for name in CALLS:
            self._patches.enter_context(patch.object(os, name, self._counted(name, getattr(os, name))))
        self._patches.enter_context(patch.object(io, "open", self._opened))
        return self

    def __exit__(self, *error: object) -> None:
        """Give the real one back, and close what a process that died has left open."""
        self._patches.close()
        for file in self._files:
            file.close()

    def ask(self, kind: str, call: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        """Do what is asked of the disk, or fail.

        Args:
            kind: Name of the call, for the count.
            call: Does it.
            half: Does a part of it, where there are parts.

        Returns:
            What the call returns.

        Raises:
            Death: The process dies here, or is dead already.
            OSError: The call fails.
        """
        if self.dead:
            if kind == "close":  # as the system does for a process that dies
                call()
            raise Death
        hit = sum(self.calls.values()) == self._at
        self.calls[kind] += 1
        if not hit:
            if self.failed and self._how == "full" and kind == "write":
                raise OSError(28, "No space left on device")
            return call()
        self.failed, self.dead = True, self._how.startswith("death")
        if self._how == "death within" and half is not None:
            half()
        if self._how in ("death after", "reported late") or kind == "close":  # which frees the handle in any case
            result = call()
            if kind == "open":
                self._close(result)  # nobody else knows of it
        raise Death if self.dead else OSError(28, "No space left on device")

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **named: self.ask(name, lambda: call(*arguments, **named))

    def _opened(self, file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        """Open a file; one for writing bytes counts what is written."""
        if isinstance(file, int) or mode not in ("wb", "w+b", "r+b", "ab"):
            return self._open(file, mode, *arguments, **named)
        raw: _Raw = self.ask("open to write", lambda: self._raw(os.fspath(file), mode.replace("b", "")))
        return io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)

    def _raw(self, path: str, mode: str) -> _Raw:
        self._files.append(file := _Raw(self, path, mode))
        return file


class _Raw(io.FileIO):
    """A file without a buffer, whose writes go by the disk."""

    def __init__(self, disk: FailingDisk, path: str, mode: str) -> None:
        super().__init__(path, mode)
        self._disk = disk

    def write(self, data: Any, /) -> int:
        """Write; a dead process writes nothing, and does not find out."""
        if self._disk.dead:
            return len(data)
        written: int = self._disk.ask(
            "write", lambda: super(_Raw, self).write(data), lambda: super(_Raw, self).write(data[: len(data) // 2])
        )
        return written

    def truncate(self, size: int | None = None, /) -> int:
        """Cut the file; as `write`."""
        if self._disk.dead:
            return size or 0
        cut: int = self._disk.ask("truncate", lambda: super(_Raw, self).truncate(size))
        return cut
