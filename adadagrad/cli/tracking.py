"""``--track``: the run's log, as it is written, into experiment trackers; never at the cost of the training."""

from __future__ import annotations

import math
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from adadagrad.cli.config import Settings
from adadagrad.cli.names import find
from adadagrad.cli.outcome import choices
from adadagrad.core.errors import InvalidArgument
from adadagrad.integrations.trackers import Follower, MLflow, Prometheus, TensorBoard, Tracker, Trackio, WandB

FOLDER = "tracked"
"""In the run directory: what a resumed run needs to go on in the same runs of the trackers."""
PROJECT = "adadagrad"
"""Project or experiment, where the flag names none."""
EVERY_SECONDS = 1.0
"""Between two looks at the log."""
PATIENCE_SECONDS = 60.0
"""Between two attempts, where a tracker does not take what it is given."""


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """What a tracker is made for.

    Args:
        directory: The run directory.
        key: A word that names the run for good.
        where: What stands after the colon of the flag; empty where nothing does.
        settings: All choices of the run.
    """

    directory: Path
    key: str
    where: str
    settings: Mapping[str, object]


TRACKERS: Mapping[str, Callable[[Tracked], Tracker]] = {
    "tensorboard": lambda run: TensorBoard(Path(run.where) / run.key if run.where else run.directory / "tensorboard"),
    "wandb": lambda run: WandB(
        run.where or PROJECT,
        run_id=run.key,
        config=run.settings,
        name=run.directory.name,
        dir=run.directory,
        settings={"console": "off"},
    ),
    "mlflow": lambda run: MLflow(
        run.where or PROJECT, run_name=run.directory.name, run_key=run.key, config=run.settings
    ),
    "trackio": lambda run: Trackio(run.where or PROJECT, name=run.key, config=run.settings),
    "prometheus": lambda run: Prometheus(
        Path(run.where) / f"{PROJECT}-{run.key}.prom" if run.where else run.directory / "metrics.prom",
        labels={"run": run.directory.name},
    ),
}


class Tracking:
    """Lets trackers follow the run that is being trained.

    A tracker that fails is named once; the training goes on, and what it has not taken is offered again.

    Args:
        followers: By the tracker's name.
    """

    def __init__(self, followers: Mapping[str, Follower]) -> None:
        self._followers = followers
        self._due = dict.fromkeys(followers, -math.inf)
        self._failing: set[str] = set()

    def step(self) -> None:
        """Send what has been written, where that is due; cheap enough to call at each step."""
        now = time.monotonic()
        for name, due in self._due.items():
            if now >= due:
                self._send(name)

    def finish(self) -> None:
        """Send all that has been written."""
        for name in self._followers:
            self._send(name)

    def _send(self, name: str) -> None:
        try:
            self._followers[name].catch_up()
        except Exception as error:  # whatever a foreign library raises: the run is worth more
            self._failed(name, error)
            self._due[name] = time.monotonic() + PATIENCE_SECONDS
        else:
            self._due[name] = time.monotonic() + EVERY_SECONDS

    def _failed(self, name: str, error: Exception) -> None:
        if name not in self._failing:
            self._failing.add(name)
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"adadagrad: --track {name} fails, training goes on: {reason}", file=sys.stderr)


def check_trackers(track: Sequence[str]) -> None:
    """Refuse trackers that do not exist, before anything is made.

    Args:
        track: What ``--track`` names.

    Raises:
        UnknownName: There is no such tracker.
        InvalidArgument: One is named twice.
    """
    names = [word.partition(":")[0] for word in track]
    for name in names:
        find("tracker", name, TRACKERS)
        if names.count(name) > 1:
            raise InvalidArgument(f"--track {name} is given twice: name each tracker once")


@contextmanager
def tracking(track: Sequence[str], directory: Path, settings: Settings) -> Iterator[Tracking]:
    """Inside its context trackers follow a run, the last lines and all.

    Args:
        track: What ``--track`` names.
        directory: The run directory.
        settings: All choices, which the trackers show.

    Yields:
        What is to be told of each step.

    Raises:
        MissingExtra: A tracker's package is not installed.
        InvalidArgument: A tracker refuses what it is given.
    """
    with ExitStack() as stack:
        trackers: dict[str, Tracker] = {}
        key = _key_of(directory) if track else ""
        new = bool(track) and not any(directory.iterdir())
        try:
            for word in track:
                name, _, where = word.partition(":")
                trackers[name] = find("tracker", name, TRACKERS)(
                    Tracked(directory=directory, key=key, where=where, settings=choices(settings))
                )
                stack.callback(_close, name, trackers[name])
        except BaseException:
            stack.close()
            if new:  # what the trackers before the one that refuses have written
                shutil.rmtree(directory)
            raise
        if trackers:
            (directory / FOLDER).mkdir(exist_ok=True)
            (directory / FOLDER / "key").write_text(key + "\n", encoding="utf-8")
        marks = {name: directory / FOLDER / f"{name}.json" for name in trackers}
        sender = Tracking({name: Follower(directory, one, mark=marks[name]) for name, one in trackers.items()})
        try:
            yield sender
        finally:
            sender.finish()


def _key_of(directory: Path) -> str:
    """The run's word: of its folder's name and chance, and as it was where the run goes on."""
    kept = directory / FOLDER / "key"
    return kept.read_text(encoding="utf-8").strip() if kept.is_file() else f"{directory.name}-{secrets.token_hex(4)}"


def _close(name: str, tracker: Tracker) -> None:
    try:
        tracker.close()
    except Exception as error:  # as for `Tracking`
        print(f"adadagrad: --track {name} could not be closed: {error}", file=sys.stderr)
