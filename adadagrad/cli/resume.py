"""What continuing a run may change, and what it may not."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from adadagrad.cli.arguments import CONFIG_NAME
from adadagrad.cli.config import Settings
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
