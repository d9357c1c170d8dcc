"""Sums over ranks: a no-op in one process, the sum in two (gloo, loopback, bounded by a timeout)."""

from __future__ import annotations

import multiprocessing
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from adadagrad.core.comm import all_reduce_sum, sum_scalars, world_size
from adadagrad.core.records import GradientStatistics

SECONDS = 120


def test_one_process_adds_nothing():
    x = torch.tensor([1.0, 2.0])
    assert world_size() == 1
    assert all_reduce_sum(x) is x
    assert sum_scalars(1.5, 2.0) == (1.5, 2.0)
    assert sum_scalars() == ()


def _rank(rank, port, results):
    """What each of two processes does; the statistics of 3 and 5 examples must be those of all 8."""
    from adadagrad.statistics.sums import WeightedSums

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timeout=timedelta(seconds=SECONDS))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=SECONDS))
    try:
        x = torch.arange(3.0) + 10 * rank
        same = all_reduce_sum(x)
        units = _units()[(slice(0, 3), slice(3, 8))[rank]]
        total = all_reduce_sum(units.sum(0) / 8)
        sums = WeightedSums()
        c = torch.full((len(units),), 1 / 8, dtype=torch.float64)
        sums.add(c, units.square().sum(1))
        sums.products.append((c, units @ total))
        whole = sums.over_ranks()
        v, vp = whole.variance_trace(float(total.square().sum())), whole.inner_product_variance()
        tiny = sum_scalars(1e-17, 1.0, float(rank))
        results.put((rank, world_size(), same is x, x.tolist(), tiny, whole.units, v, vp))
    finally:
        dist.destroy_process_group()


def _units():
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.timeout(2 * SECONDS)
def test_two_processes_hold_the_same_sums():
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.Queue()
    processes = [context.Process(target=_rank, args=(rank, port, results), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        found = sorted(results.get(timeout=SECONDS) for _ in processes)
    finally:
        for process in processes:
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()
    units = _units()
    mean = units.mean(0)
    truth = GradientStatistics(
        num_examples=8,
        grad_norm_sq=float(mean.square().sum()),
        variance_trace=float(units.var(0).sum()),
        inner_product_variance=float((units @ mean).var()),
    )
    for rank, (number, size, in_place, x, tiny, count, v, vp) in enumerate(found):
        assert (number, size, in_place) == (rank, 2, True)
        assert x == [10.0, 12.0, 14.0]
        assert tiny == (2e-17, 2.0, 1.0)
        assert count == 8
        assert v == pytest.approx(truth.variance_trace, rel=1e-12)
        assert vp == pytest.approx(truth.inner_product_variance, rel=1e-12)
    assert found[0][6:] == found[1][6:]  # bitwise the same on both ranks
    assert [process.exitcode for process in processes] == [0, 0]
