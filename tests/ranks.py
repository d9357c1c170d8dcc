"""A function on several processes that talk over loopback under gloo: what the tests of many ranks stand on."""

from __future__ import annotations

import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 240
"""Seconds after which a rank that has not answered is taken for stuck, and all are ended."""


def on_ranks(count: int, function: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT) -> list[Any]:
    """Return ``function(rank, *arguments)`` of every rank, run in processes of their own.

    Starting them takes some seconds: let one call do the work of many tests, in a fixture of the module.

    Args:
        count: Number of ranks.
        function: Module-level function (it is pickled by name); returns what pickles.
        *arguments: What pickles.
        timeout: Seconds that the ranks may take.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=_run, args=(function, rank, count, port, queue, arguments), daemon=True)
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    try:
        results: dict[int, Any] = {}
        for _ in processes:
            rank, value = queue.get(timeout=timeout)
            if isinstance(value, BaseException):
                raise value
            results[rank] = pickle.loads(value)
        for process in processes:
            process.join(TIMEOUT)
            assert process.exitcode == 0
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(count)]


def on_two_ranks(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The same on two ranks."""
    return on_ranks(2, function, *arguments)


def _run(
    function: Callable[..., Any], rank: int, count: int, port: int, queue: Any, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    status = 1
    try:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
        try:
            queue.put((rank, pickle.dumps(function(rank, *arguments))))
            status = 0
        finally:
            dist.destroy_process_group()
    except BaseException as error:  # what pytest fails with is no Exception
        queue.put((rank, RuntimeError(f"rank {rank}: {error!r}\n{traceback.format_exc()}")))
    # Without the interpreter's own end, in which a thread of gloo may let go of a message that FSDP2 has sent, and
    # torch 2.13 aborts the process (LOG.md). How a process ends after DDP, tests/docs/test_launch.py looks at.
    queue.close()
    queue.join_thread()
    os._exit(status)
