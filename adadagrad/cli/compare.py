"""``adadagrad compare``: the same model and samples with a small, a large, the paper's and a chosen batch size."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from adadagrad.cli.arguments import CompareCommand, parse, settings_of
from adadagrad.cli.building import make_engine
from adadagrad.cli.config import Settings
from adadagrad.cli.data import load_data
from adadagrad.cli.directory import REPORT_NAME, new_directory, remove_if_empty
from adadagrad.cli.flags import flags_named
from adadagrad.cli.train import show_results, train
from adadagrad.core.checks import check_integer
from adadagrad.core.errors import InvalidArgument

PAPER = "paper-norm"
"""Name of the run with the paper's test."""
FIRST_SIZES = ("small-batch-size", "large-batch-size", "global-batch-size", "global-batch-size")
"""The flag that says each run's first batch size, in their order."""


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Args:
        arguments: What follows ``compare``.

    Returns:
        The exit status: 0, or 130 after Ctrl-C or SIGTERM.
    """
    command = parse("compare", CompareCommand(), arguments)
    runs = compared_settings(command)
    data = load_data(command.problem.data)
    for settings, flag in zip(runs.values(), FIRST_SIZES, strict=True):
        with flags_named(global_batch_size=flag):
            make_engine(settings, data, None)  # so that a wrong argument is refused before anything is trained
    directory = new_directory(command.files.out, "compare")
    print(f"{len(runs)} runs of {command.problem.model} on {command.problem.data}, into {directory}", file=sys.stderr)
    finished = True
    try:
        for name, settings in runs.items():
            place = new_directory(directory / name, "compare")
            try:
                finished = train(settings, data, place)
            finally:
                remove_if_empty(place)
            if not finished:
                break
    finally:
        remove_if_empty(directory)
    show_results([directory / name for name in runs], directory / REPORT_NAME)
    if not finished:
        print(f"stopped: {directory} holds what was done", file=sys.stderr)
    return 0 if finished else 130


def compared_settings(command: CompareCommand) -> dict[str, Settings]:
    """Derive the four runs, which differ in how batch size and learning rate are chosen alone.

    The paper's run is the norm test with the eta given and a learning rate that does not follow the batch, neither
    bounded in its growth nor shrinking.

    Args:
        command: What the user chose.

    Returns:
        Settings by the run's name, in the order of training.

    Raises:
        InvalidArgument: The policy is a constant batch, or the two constant sizes are out of order.
    """
    small, large = command.comparison.small_batch_size, command.comparison.large_batch_size
    with flags_named(small_batch_size="small-batch-size", large_batch_size="large-batch-size"):
        check_integer(1, small_batch_size=small, large_batch_size=large)
    if small >= large:
        raise InvalidArgument(f"--small-batch-size must be < --large-batch-size, got {small} and {large}")
    if command.batch.policy == "constant":
        raise InvalidArgument("--policy constant is in the comparison already: choose another, such as norm")
    settings = settings_of(command)
    runs = {}
    for size in (small, large):
        batch = replace(
            settings.batch, policy="constant", global_batch_size=size, min_batch_size=None, max_batch_size=None
        )
        runs[f"constant-{size}"] = replace(settings, batch=batch)
    batch = replace(settings.batch, policy="norm", min_batch_size=None, max_growth=None, confidence=None)
    paper = replace(settings, batch=batch, optimizer=replace(settings.optimizer, rate="none"))
    return {**runs, PAPER: paper, settings.batch.policy: settings}
