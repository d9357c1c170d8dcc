"""Ctrl-C that lets the step in progress finish, so that what is saved is whole."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Interrupt:
    """Inside its context the first Ctrl-C only sets `requested`; the second one interrupts at once.

    Outside the main thread, where signals cannot be caught, it does nothing.

    Example:
        >>> with Interrupt() as interrupt:
        ...     interrupt.requested
        False
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: object = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._before)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
