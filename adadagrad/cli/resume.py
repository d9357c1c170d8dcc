"""What continuing a run may change, and what it may not."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from adadagrad.checkpoint import load_checkpoint
from adadagrad.cli.arguments import CONFIG_NAME
from adadagrad.cli.config import Settings
from adadagrad.cli.directory import CHECKPOINT_NAME
from adadagrad.cli.toml_file import read_settings
from adadagrad.core.errors import InvalidArgument

MAY_CHANGE = frozenset({"epochs", "samples", "evaluations", "checkpoints", "device", "threads"})
"""Settings that a resumed run may change: how far and where it goes on, not what it is."""


def refuse_changes(settings: Settings, directory: Path) -> None:
    """Refuse to continue a run with other settings, which the checkpoint would partly override.

    Args:
        settings: All choices, from the run's own file and the flags over it.
        directory: The run directory.

    Raises:
        InvalidArgument: A setting differs that is not in `MAY_CHANGE`.
    """
    old, new = asdict(read_settings(directory / CONFIG_NAME, Settings())), asdict(settings)
    for group, values in new.items():
        for name, value in values.items():
            if name not in MAY_CHANGE and value != old[group][name]:
                raise InvalidArgument(
                    f"--{name.replace('_', '-')} {value} cannot be changed on --resume, the run in {directory} has "
                    f"{old[group][name]}: leave it out, or start a new run"
                )


def refuse_contradictions(total_samples: int, directory: Path) -> None:
    """Refuse to continue where budget or log contradict the checkpoint; loading it would already cut the log back.

    Args:
        total_samples: The budget.
        directory: The run directory.

    Raises:
        InvalidArgument: The run is past the budget already, or its log has been taken away.
    """
    state = load_checkpoint(directory / CHECKPOINT_NAME).get("engine", {})
    seen = state.get("samples_seen", 0)
    counts_samples = state.get("learning_rate", {}).get("progress", seen) == seen  # not what AdaScale counts
    if counts_samples and seen > total_samples:
        raise InvalidArgument(
            f"--resume: the run in {directory} has seen {seen} samples, more than the budget of {total_samples}: give "
            "more --samples, or leave the budget out"
        )
    if seen > 0 and not (directory / "run.jsonl").is_file():
        raise InvalidArgument(
            f"--resume: {directory} holds a checkpoint at {seen} samples but no run.jsonl, so the log would begin in "
            "the middle: put it back, or start a new run"
        )
