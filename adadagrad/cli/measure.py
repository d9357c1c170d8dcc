"""``adadagrad measure``: which batch size to use, from the noise of the gradient in a brief training."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from torch.nn import functional as F

from adadagrad.cli.arguments import CONFIG_NAME
from adadagrad.cli.building import make_engine
from adadagrad.cli.config import Settings
from adadagrad.cli.data import DataSource, load_data
from adadagrad.cli.directory import REPORT_NAME, new_directory, remove_if_empty
from adadagrad.cli.fit import check_data
from adadagrad.cli.flags import flags_named
from adadagrad.cli.interrupt import Interrupt
from adadagrad.cli.measure_arguments import budget, parse_measure, settings_to_measure
from adadagrad.cli.progress import progress_display
from adadagrad.cli.toml_file import settings_toml
from adadagrad.cli.train import threads_of, users_code
from adadagrad.cli.weights import load_weights
from adadagrad.core.errors import InvalidArgument, InvalidMeasurement, MissingExtra
from adadagrad.core.records import Observation
from adadagrad.policies.base import AbstractPolicy
from adadagrad.report.answers import Answers, answers
from adadagrad.report.noise import LEAST_STEPS, measured_rows
from adadagrad.report.page import write_report
from adadagrad.report.reader import LOG_NAME, read_run
from adadagrad.report.table import table_text

WIDEST = 100
"""Columns of the text at most."""


@dataclass(frozen=True, slots=True)
class Watch(AbstractPolicy):
    """Keep the batch size, and have everything measured that the answers are made of."""

    needs: ClassVar[frozenset[str]] = frozenset({"grad_norm_sq", "variance_trace", "inner_product_variance"})
    monotone: ClassVar[bool] = False

    def required_batch_size(self, observation: Observation) -> float:
        """Return the size of the step just taken, in examples."""
        return float(observation.global_batch_size or 1)


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Args:
        arguments: What follows ``measure``.

    Returns:
        The exit status: 0, or 130 after Ctrl-C or SIGTERM.

    Raises:
        InvalidMeasurement: Fewer steps could be measured than an answer needs.
    """
    command = parse_measure(arguments)
    data = load_data(command.problem.data)
    check_data(data)
    settings = settings_to_measure(command, budget(command, len(data.train)))  # type: ignore[arg-type]
    directory = new_directory(command.files.out, "measure")
    try:
        finished = measure(settings, data, directory, command.files.checkpoint)
    finally:
        remove_if_empty(directory)
    measured = show_answers(directory)
    if not finished:
        few = f", and {LEAST_STEPS} are the fewest that say anything" if measured < LEAST_STEPS else ""
        print(f"stopped after {measured:,} measured steps{few}", file=sys.stderr)
        return 130
    if measured < LEAST_STEPS:
        raise InvalidMeasurement(
            f"only {measured} steps could be measured, and {LEAST_STEPS} are the fewest that say anything: see "
            f"{directory / 'run.jsonl'} for the reason of each step"
        )
    return 0


@flags_named()
def measure(settings: Settings, data: DataSource, directory: Path, checkpoint: Path | None = None) -> bool:
    """Train with a constant batch and everything measured, and leave the log in a directory.

    Args:
        settings: All choices.
        data: The data that they name.
        directory: The run directory.
        checkpoint: Weights to begin with; None for those that the model is made with.

    Returns:
        True where the budget was used, False where Ctrl-C or SIGTERM ended the run early.

    Raises:
        InvalidArgument: A setting is out of range, contradicts another one or the data, or the weights do not fit.
    """
    with threads_of(settings):
        engine = make_engine(settings, data, directory, Watch())
        _refuse_few_steps(settings, engine.total_samples)
        if checkpoint is not None:
            load_weights(engine.model, checkpoint)
        origin = f"# weights from {checkpoint.absolute()}\n" if checkpoint is not None else ""
        (directory / CONFIG_NAME).write_text(origin + settings_toml(settings), encoding="utf-8")
        progress = progress_display(directory.name, engine.total_samples)
        with closing(progress), Interrupt() as interrupt, users_code(settings):
            for step in engine:
                step.run(lambda batch: F.cross_entropy(engine.model(batch[0]), batch[1]))
                progress.step(step.update())
                if interrupt.requested:
                    break
        return engine.progress >= engine.total_samples


def show_answers(directory: Path) -> int:
    """Print what a run says and write its page; without the report's extra, say how to get one.

    Args:
        directory: The run directory.

    Returns:
        How many steps were measured.
    """
    if not (directory / LOG_NAME).is_file():
        return 0
    run = read_run(directory)
    found = answers(run)
    if found is not None:
        print(answers_text(found))
    try:
        print(f"report: {write_report([run], directory / REPORT_NAME)}")
    except MissingExtra as error:
        print(f"no report: {error}", file=sys.stderr)
    return len(measured_rows(run))


def answers_text(found: Answers) -> str:
    """Lay the answers out for a terminal.

    Args:
        found: The answers.

    Returns:
        Tables, then sentences folded to the width of the terminal, at most `WIDEST` columns.
    """
    width = min(WIDEST, shutil.get_terminal_size().columns)
    blocks = [f"{found.measured}:"]
    for table in found.tables:
        notes = [textwrap.fill(note, width) for note in table.notes]
        blocks.append("\n".join([table_text(replace(table, notes=[])), *notes]))
    return "\n\n".join([*blocks, *(textwrap.fill(text, width) for text in (*found.advice, found.limits))])


def _refuse_few_steps(settings: Settings, samples: int) -> None:
    """Refuse a budget that would end before anything can be said."""
    size, every = settings.batch.global_batch_size, settings.measure.measure_every
    steps = samples // size
    if every != "auto" and -(-steps // every) < LEAST_STEPS:
        raise InvalidArgument(
            f"{samples} samples hold {steps} step{'s' * (steps != 1)} of {size}, of which {-(-steps // every)} would "
            f"be measured, and {LEAST_STEPS} are the fewest that say anything: give --samples "
            f"{((LEAST_STEPS - 1) * every + 1) * size} or more"
        )
