"""SIGTERM and SIGINT as a wish that all ranks agree on: the step in progress is finished, saved, and the run left."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from adadagrad.engine.saving import checkpoint
from adadagrad.parallel.starting import under_torchrun

if TYPE_CHECKING:
    from adadagrad.engine.adaptive_batch import AdaptiveBatch

STATUS = 143
"""Exit status of a run that was told to stop and has saved: 128 + SIGTERM, what batch systems expect."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stopping(engine: AdaptiveBatch) -> Iterator[None]:
    """Let the first signal only set `stop_requested`; the second one acts as it would have without this.

    Under ``torchrun`` no signal acts at once: one Ctrl-C may come twice there, from the terminal and from ``torchrun``,
    which kills what has not ended 30 s later.

    Only where the engine saves by itself (`checkpoint_every`), in the main thread, and only in the place of Python's
    own handlers: a handler that somebody has set stays.

    Args:
        engine: The engine, whose loop runs inside.

    Yields:
        Nothing.
    """
    before: dict[int, Any] = {}  # handlers by signal

    def handle(number: int, frame: FrameType | None) -> None:
        engine.stop_requested = True
        if not under_torchrun():
            signal.signal(number, before[number])

    if engine._checkpoint_every is not None and threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for taken, handler in before.items():
            signal.signal(taken, handler)


def leave_if_agreed(engine: AdaptiveBatch) -> None:
    """End the run once the ranks have agreed to: save, and exit with `STATUS`.

    Args:
        engine: The engine, after a step. One that does not save by itself leaves the end to whoever set the wish.

    Raises:
        SystemExit: The ranks have agreed to stop.
    """
    if engine.stop_agreed and engine._checkpoint_every is not None:
        checkpoint(engine)
        raise SystemExit(STATUS)
