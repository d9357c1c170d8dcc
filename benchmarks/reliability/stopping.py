"""Test 13: SIGTERM to one rank ends all of them after the same step, saved, with status 143, and the run goes on."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import adadagrad as ada
from benchmarks.reliability.figure import Figure
from tests.engine.cases import make_engine, make_model, mean_loss, read_log, train, weights
from tests.ranks import on_ranks

PLACES = ("forward", "backward", "update", "between")
"""Where in a step a signal finds a rank."""

HANG = 90
"""Seconds after which a process that has not ended is taken for stuck."""


def signals(ranks: int, runs: int, processes: int) -> Iterator[Figure]:
    """Yield what a SIGTERM to one rank does.

    Args:
        ranks: How many ranks there are.
        runs: Runs in one group of processes, in which a rank tells itself.
        processes: Runs whose ranks are processes of their own, told from outside.

    Yields:
        The figures of test 13.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = on_ranks(ranks, told_to_stop, ranks, runs, folder)
        expected = read_log(Path(folder) / "whole")
        same = sum(read_log(Path(folder) / str(number)) == expected for number in range(runs))
        outside = [told_from_outside(ranks, Path(folder) / f"outside-{k}", k) for k in range(processes)]
        went_on = sum(read_log(Path(folder) / f"outside-{k}") == expected for k in range(processes))
    left = sum(all(rank[0][number] == 143 for rank in found) for number in range(runs))
    name = f"of {runs} signals to one of {ranks} ranks all ranks left with 143, none hung"
    yield Figure(test=13, name=name, value=left, comparison="==", bar=runs)
    yield Figure(test=13, name="of them went on to the uninterrupted trace", value=same, comparison="==", bar=runs)
    took = [max(rank[1][number][1] for rank in found) - found[0][1][number][0] for number in range(runs)]
    yield Figure(test=13, name="seconds from signal to the last exit, at most", value=max(took), bar=30)
    apart = sum(not torch.equal(rank[2], found[0][2]) for rank in found)
    yield Figure(test=13, name="ranks that ended with other weights", value=apart, bar=0)
    left = sum(codes == [143] * ranks and again == [0] * ranks for codes, again, _ in outside)
    name = f"of {processes} runs of {ranks} processes, one told from outside, all left with 143 and came back"
    yield Figure(test=13, name=name, value=left, comparison="==", bar=processes)
    yield Figure(
        test=13, name="of them went on to the uninterrupted trace", value=went_on, comparison="==", bar=processes
    )
    slowest = max(took for _, _, took in outside)
    yield Figure(test=13, name="seconds from signal to the end of the last process, at most", value=slowest, bar=30)


def told_to_stop(rank: int, ranks: int, runs: int, folder: str) -> tuple[list[Any], list[Any], torch.Tensor]:
    """Run, get the signal at a random place of a random step, go on in a new engine.

    Args:
        rank: This rank.
        ranks: How many there are.
        runs: How often.
        folder: Where the runs' folders are made.

    Returns:
        The exit status of each run, its times of signal and exit, and the weights at the end of the last one.
    """
    codes, times, choose = [], [], random.Random(0)
    train(_stoppable(f"{folder}/whole", ranks))
    engine: Any = None
    for number in range(runs):
        victim, at, place = choose.randrange(ranks), choose.randrange(1, 12), choose.choice(PLACES)
        engine = _stoppable(f"{folder}/{number}", ranks)
        sent: list[float] = []
        code = None
        try:
            _signalled(engine, at, place if rank == victim else None, sent)
        except SystemExit as status:
            code = status.code
        left_at = time.time()
        codes.append(code)
        times.append((max(engine.parallel.ranks.gather(sent[0] if sent else 0.0)), left_at))
        engine = _stoppable(f"{folder}/{number}", ranks)
        if engine.resume():
            train(engine)
    return codes, times, weights(engine.parallel.module)


def _stoppable(folder: str, ranks: int) -> Any:
    model = make_model(0.3)
    torch.manual_seed(3)
    return make_engine(
        DistributedDataParallel(model, find_unused_parameters=ranks > 2),  # whose buckets stay, over a resume
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        policy=ada.NormTest(eta=0.6),
        measure=ada.Measure(every=1, max_examples=None),
        global_batch_size=8,
        max_batch_size=64,
        total_samples=600,
        log_dir=folder,
        checkpoint_every=10**9,
    )


def _signalled(engine: Any, at: int, place: str | None, sent: list[float]) -> None:
    def tell(here: str) -> None:
        if not sent and here == place and engine.steps + (here != "between") == at:
            sent.append(time.time())
            os.kill(os.getpid(), signal.SIGTERM)

    def loss(batch: Any) -> torch.Tensor:
        tell("forward")
        value = mean_loss(engine.model)(batch)
        value.register_hook(lambda gradient: tell("backward"))
        return value

    for step in engine:
        step.run(loss)
        tell("update")
        step.update()
        tell("between")


def told_from_outside(ranks: int, folder: Path, seed: int) -> tuple[list[int | None], list[int | None], float]:
    """Start ranks as processes, end one with SIGTERM at a random time, start all again.

    Args:
        ranks: How many there are.
        folder: The run's directory.
        seed: Chooses rank and time.

    Returns:
        The exit statuses of the first and of the second start, None for a process that had to be killed; seconds from
        the signal to the end of the last process.
    """
    choose, log = random.Random(seed), folder / "run.jsonl"
    with _started(ranks, folder) as processes:
        deadline = time.monotonic() + HANG
        while not (log.is_file() and log.read_bytes().count(b"\n") > 1) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(choose.uniform(0, 0.5))
        told = time.monotonic()
        processes[choose.randrange(ranks)].terminate()
        codes = _ends(processes)
        took = time.monotonic() - told
    with _started(ranks, folder) as processes:
        return codes, _ends(processes), took


@contextmanager
def _started(ranks: int, folder: Path) -> Iterator[list[Any]]:
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as meeting:
        processes = [
            context.Process(target=_slow_rank, args=(rank, ranks, str(folder), meeting), daemon=True)
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            yield processes
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()


def _ends(processes: list[Any]) -> list[int | None]:
    deadline = time.monotonic() + HANG
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    return [process.exitcode for process in processes]


def _slow_rank(rank: int, ranks: int, folder: str, meeting: str) -> None:
    """Train from the newest checkpoint to the end, slowly enough to be told to stop on the way."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=ranks)
    try:
        engine = _stoppable(folder, ranks)
        engine.resume()
        loss = mean_loss(engine.model)

        def slow(batch: Any) -> torch.Tensor:
            time.sleep(0.05)
            return loss(batch)

        train(engine, slow)
    finally:
        dist.destroy_process_group()
