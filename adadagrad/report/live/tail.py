"""What has come to a log since the last look; a log that was cut back is read again from its beginning."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

MOST = 8 << 20
"""Bytes read at one look, so that a long log is shown bit by bit and not after a long wait."""
LAST = 64
"""Bytes before the place read up to that must be as they were: a log that was cut back and has grown again differs."""


class Tail:
    """Reads a file's whole lines, each once; what is not there yet is an empty file.

    Args:
        path: The file.
        most: About how many bytes are read at one look.
    """

    def __init__(self, path: Path, *, most: int = MOST) -> None:
        self.path, self._most = path, most
        self._offset, self._before = 0, b""
        self.more = False
        """Whether there was more than one look could take."""

    def read(self) -> tuple[list[bytes], bool]:
        """Return the lines that are new.

        Returns:
            The lines, each without its newline, and whether they are the first ones of the file again, because it was
            cut back or replaced. A last line without a newline is left for the next look.
        """
        self.more = False
        try:
            with self.path.open("rb") as file:
                return self._read(file)
        except OSError:  # not there, or not to be read
            again = self._offset > 0
            self._offset, self._before = 0, b""
            return [], again

    def _read(self, file: BinaryIO) -> tuple[list[bytes], bool]:
        file.seek(max(0, self._offset - LAST))
        again = file.read(min(LAST, self._offset)) != self._before
        if again:
            self._offset, self._before = 0, b""
        file.seek(self._offset)
        chunk = file.read(self._most)
        if len(chunk) == self._most:
            chunk += file.readline()
            self.more = True
        whole = chunk[: chunk.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._before = (self._before + whole)[-LAST:]
        return whole.split(b"\n")[:-1], again
