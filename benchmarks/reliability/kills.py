"""Test 9: runs that are killed at random times, also in the middle of a save, end as if nothing had happened.

A run is a process of its own: a fork of one that has made such a run on its only thread, so that it starts at once.
SIGKILL ends it after a random time; then a new one resumes from the run's directory, until one gets to the end. In
every second run the disk is slow (1 ms more for each time that it is waited for), so that many kills fall into a save.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import adadagrad as ada
from adadagrad.checkpoint import CheckpointStore, load_checkpoint
from adadagrad.core.errors import AdadagradError
from adadagrad.report.reader import read_run
from benchmarks.reliability.figure import Figure
from tests.engine.cases import make_engine, make_model, read_log, train

KILLS = 12
"""Times that one run is killed at most before it may end."""
SLOW = 0.001


def figures(reduced: bool) -> Iterator[Figure]:
    """Yield the figures of test 9.

    Args:
        reduced: 10 runs in the place of 100.

    Yields:
        One figure after the other.
    """
    runs = 10 if reduced else 100
    choose = random.Random(0)
    with tempfile.TemporaryDirectory() as name, _Zygote() as zygote:
        folder = Path(name)
        zygote.run(folder / "first", slow=False, kill_after=None)
        started = time.perf_counter()
        zygote.run(folder / "whole", slow=False, kill_after=None)
        spans = [(time.perf_counter() - started) * share for share in (0.5, 1.0)]
        expected = read_log(folder / "whole")
        same = kills = unreadable = saving = resumed = spared = 0
        for number in range(runs):
            run, slow = folder / str(number), number % 2
            hits = starts = 0
            while starts < KILLS:
                before = set(run.glob("checkpoints/*.pt"))
                resumed += bool(before)
                starts += 1
                if zygote.run(run, slow=slow == 1, kill_after=choose.uniform(0, spans[slow])):
                    spans[slow] *= 0.7  # the machine is faster than it was
                    if hits:
                        break
                    spared += read_log(run) != expected  # nothing has hit it: it is as it should be, and starts again
                    shutil.rmtree(run)
                    continue
                hits += 1
                saving += any(run.glob("checkpoints/*.tmp"))
                unreadable += not readable(run)
                if set(run.glob("checkpoints/*.pt")) == before:
                    spans[slow] *= 1.1  # or slower
            else:
                resumed += any(run.glob("checkpoints/*.pt"))
                zygote.run(run, slow=slow == 1, kill_after=None)
            kills += hits
            same += hits > 0 and read_log(run) == expected
    name = f"of {runs} runs, each killed once at least, end with the uninterrupted trace"
    yield Figure(test=9, name=name, value=same, comparison="==", bar=runs)
    yield Figure(test=9, name="run directories that cannot be read after a kill", value=unreadable, bar=0)
    yield Figure(test=9, name="runs that no kill has hit and that end with another trace", value=spared, bar=0)
    yield Figure(test=9, name="kills", value=kills, comparison=">=", bar=runs)
    yield Figure(test=9, name="kills while a checkpoint was being written", value=saving, comparison=">=", bar=1)
    yield Figure(test=9, name="starts that found a checkpoint", value=resumed, comparison=">=", bar=runs // 2)


def readable(run: Path) -> bool:
    """Return whether a run's log and all its checkpoints can be read, as a kill has left them."""
    log = run / "run.jsonl"
    try:
        if log.is_file() and b"\n" in log.read_bytes():  # a start record is there
            read_run(run)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # one for each checkpoint that is passed over
            CheckpointStore(run / "checkpoints").load_newest()
        for path in run.glob("checkpoints/*.pt"):
            load_checkpoint(path)
    except (AdadagradError, UserWarning):
        return False
    return True


def run_to_the_end(folder: str, slow: bool) -> None:
    """Train, from the newest checkpoint if there is one: what a user's script does."""
    if slow:
        whole = os.fsync

        def fsync(handle: int) -> None:
            time.sleep(SLOW)
            whole(handle)

        os.fsync = fsync
    model = make_model(0.3)
    engine: Any = make_engine(
        model,
        torch.optim.Adam(model.parameters(), lr=0.01),
        policy=ada.NormTest(eta=0.6),
        measure=ada.Measure(every=1, max_examples=None),
        total_samples=1_500,
        max_batch_size=32,
        log_dir=folder,
        checkpoint_every=24,
    )
    engine.resume()
    train(engine)


class _Zygote:
    """A process that has imported everything it needs, and of which every run is a fork."""

    def __enter__(self) -> _Zygote:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.reliability.kills"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[2],
        )
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def run(self, folder: Path, *, slow: bool, kill_after: float | None) -> bool:
        """Start a run, and kill it if it has not ended by then; return whether it has ended by itself."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{folder}\t{int(slow)}\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)  # it is there, if only as a zombie, until the zygote is told to reap it
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        if status not in (0, -signal.SIGKILL):
            raise RuntimeError(f"a run ended with status {status}")
        return status == 0


def main() -> None:
    """Be the zygote: fork a run for each line, say its number, and on the next line wait for its end."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run_to_the_end(folder, slow=False)
    for line in iter(sys.stdin.readline, ""):
        folder, slow = line.strip().split("\t")
        pid = os.fork()
        if pid == 0:
            try:
                run_to_the_end(folder, slow == "1")
                os._exit(0)
            finally:
                os._exit(1)
        print(pid, flush=True)
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
