"""The runs of a folder, as the page asks for them: all at first, what is new from then on."""

from __future__ import annotations

import json
import re
import secrets
import threading
import zlib
from pathlib import Path
from typing import Any

from adadagrad.report.live.buckets import COLUMNS, number
from adadagrad.report.live.live_run import LiveRun
from adadagrad.report.reader import LOG_NAME

MOST_RUNS = 24
"""Runs shown together; of more, the first by name."""
TOKEN = re.compile(r"([0-9a-f]{16})((?:_\d{1,15}\.\d{1,15}\.\d{1,15}){0,24})")


class LiveView:
    """One run directory, or a folder that holds run directories; either may come to be later.

    Safe to ask from several threads.

    Args:
        directory: The folder.
        most: About how many bytes of each log are read at one look; None for the default.
    """

    def __init__(self, directory: Path, *, most: int | None = None) -> None:
        self.directory = directory
        self._most = most
        self._runs: dict[Path, LiveRun] = {}
        self._own = secrets.token_hex(4)  # what another process has told is not known here
        self._lock = threading.Lock()

    def news(self, since: str = "") -> bytes:
        """Return what a page does not know yet, as JSON.

        Args:
            since: What the last answer gave as ``next``; anything else begins anew.

        Returns:
            An object of ``next``, ``more`` (whether to ask again at once), ``columns`` (of the rows) and ``runs``.
        """
        with self._lock:
            self._find()
            more = sum(run.update() for run in self._runs.values()) > 0  # of all runs, so no any()
            head = self._own + f"{zlib.crc32(str(list(self._runs)).encode()):08x}"
            places = _places(since, head, len(self._runs))
            runs = [run.news(place) for run, place in zip(self._runs.values(), places, strict=True)]
            token = head + "".join("_{}.{}.{}".format(*run.place) for run in self._runs.values())
        answer: dict[str, Any] = {"next": token, "more": more, "columns": COLUMNS, "runs": runs}
        return json.dumps(answer, allow_nan=False, separators=(",", ":")).encode()

    def _find(self) -> None:
        """Look for runs; one that was found stays, also while its log is away."""
        if (self.directory / LOG_NAME).is_file():
            found = [self.directory]
        else:
            found = sorted(log.parent for log in self.directory.glob(f"*/{LOG_NAME}"))
            if not found and self.directory in self._runs:
                found = [self.directory]
        for place in found[:MOST_RUNS]:
            if place not in self._runs:
                self._runs[place] = LiveRun(place, most=self._most)
        if found == [self.directory]:
            self._runs = {self.directory: self._runs[self.directory]}
        self._runs = dict(
            sorted(self._runs.items(), key=lambda pair: (number(pair[1].start.get("time")) or 9e99, pair[0]))
        )


def _places(since: str, head: str, count: int) -> list[tuple[int, int, int] | None]:
    """What a page knows of each run; nothing where its word is not one of ours."""
    match = TOKEN.fullmatch(since)
    if match is None or match[1] != head:
        return [None] * count
    places = [tuple(int(part) for part in word.split(".")) for word in match[2].split("_")[1:]]
    if len(places) != count:
        return [None] * count
    return places  # type: ignore[return-value]
