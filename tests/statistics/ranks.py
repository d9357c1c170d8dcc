"""A function on two processes that talk over loopback, for what is summed over ranks."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_two_ranks(function: Callable[[int], Any]) -> list[Any]:
    """Return ``function(rank)`` of rank 0 and rank 1, run in two processes under gloo.

    Args:
        function: Module-level function (it is pickled by name); returns plain numbers.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_run, args=(function, rank, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    results = dict(queue.get() for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for value in results.values():
        if isinstance(value, BaseException):
            raise value
    return [results[0], results[1]]


def _run(function: Callable[[int], Any], rank: int, port: int, queue: Any) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        try:
            queue.put((rank, function(rank)))
        finally:
            dist.destroy_process_group()
    except Exception as error:
        queue.put((rank, error))
