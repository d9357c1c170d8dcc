"""``torchrun ... -m adadagrad train``: all processes train, and one of them speaks, makes folders and writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

from adadagrad.core.comm import ALONE, Ranks, all_ranks
from adadagrad.core.errors import AdadagradError, InvalidArgument
from adadagrad.parallel.starting import join_process_group, leave_process_group, under_torchrun

Result = TypeVar("Result")


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Inside its context this process belongs to those that ``torchrun`` has started together with it.

    Args:
        device: What ``--device`` says.

    Yields:
        All of them; a single one without ``torchrun``.

    Raises:
        InvalidArgument: The device does not exist, or there are fewer than processes on this machine.
    """
    if not under_torchrun():
        yield ALONE
        return
    belonged = dist.is_initialized()
    try:
        own = join_process_group(device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidArgument(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    yield all_ranks(own)
    if not belonged:  # not after an error either: it may wait for the others, and torchrun ends them
        leave_process_group()


def by_the_first(ranks: Ranks, make: Callable[[], Result]) -> Result:
    """Do something on rank 0 alone, such as making a folder, and return what came of it on all ranks.

    Args:
        ranks: The processes.
        make: What to do; its result is pickled.

    Returns:
        Its result.

    Raises:
        AdadagradError: What it raised on purpose on rank 0, on all ranks, so that none waits for the others.
    """
    made: Result | AdadagradError | None = None
    if ranks.index == 0:
        try:
            made = make()
        except AdadagradError as error:
            made = error
    result: Result | AdadagradError = ranks.gather(made)[0]
    if isinstance(result, AdadagradError):
        raise result
    return result


def refuse_processes(command: str) -> None:
    """Refuse to run a command once a process, where it is meant for one.

    Args:
        command: Its name.

    Raises:
        InvalidArgument: ``torchrun`` has started several processes.
    """
    if under_torchrun() and int(os.environ["WORLD_SIZE"] or 1) > 1:
        raise InvalidArgument(
            f"adadagrad {command} runs in one process, and torchrun has started {os.environ['WORLD_SIZE']}: start it "
            "without torchrun; adadagrad train runs on many"
        )
