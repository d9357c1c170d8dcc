"""The flags of ``adadagrad measure``, and the run that they stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from adadagrad.cli.arguments import read_flags
from adadagrad.cli.config import BatchOptions, MeasureOptions, OptimizerOptions, ProblemOptions, RunOptions, Settings
from adadagrad.cli.toml_file import read_settings
from adadagrad.cli.unused import refuse_unused
from adadagrad.core.errors import InvalidArgument

Group = TypeVar("Group", BatchOptions, RunOptions, "ConstantBatchOptions", "BriefRunOptions")


@dataclass(frozen=True, kw_only=True)
class MeasureFiles:
    """Files: where settings and weights come from and results go.

    Args:
        config: A TOML file of settings, such as a run's config.toml; flags override it, and its budget, policy and
            [measure] table are not used.
        checkpoint: Measure at these weights instead of training: a checkpoint of train or engine.save, or a state
            dict written by torch.save.
        out: Run directory to make; without it a numbered one under runs/.
    """

    config: Path | None = None
    checkpoint: Path | None = None
    out: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ConstantBatchOptions:
    """How many examples one optimizer step averages.

    Args:
        global_batch_size: Examples in each step, and the size that larger ones are compared with.
        micro_batch_size: Most examples in one forward: what memory allows.
    """

    global_batch_size: int = 64
    micro_batch_size: int = 512


@dataclass(frozen=True, kw_only=True)
class BriefRunOptions:
    """How long, where.

    Args:
        samples: Budget in samples; without it 20 passes over the training set or 60,000 samples, whichever is less,
            and at least 50 steps.
        seed: Of the initial weights and of the order of the data.
        on_nonfinite: What a gradient that is not finite does: skip the update, or stop the run.
        device: Where to train, for example cpu or cuda.
        threads: CPU threads; 0 takes 1 where the work is too small to share out (digits, logistic, mlp), and torch's
            choice otherwise.
    """

    samples: int | None = None
    seed: int = 0
    on_nonfinite: Literal["skip", "stop"] = "skip"
    device: str = "cpu"
    threads: int = 0


@dataclass(frozen=True, kw_only=True)
class MeasureCommand:
    """Say which batch size to use: measure the gradient's noise in a brief training, or at the weights of a checkpoint.

    Trains with a constant batch and prints the noise scale over training, the batch sizes that the tests would choose,
    and what larger batches would save in steps and cost in samples; the run directory holds the same as a page.
    """

    files: MeasureFiles = field(default_factory=MeasureFiles)
    problem: ProblemOptions = field(default_factory=ProblemOptions)
    batch: ConstantBatchOptions = field(default_factory=ConstantBatchOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    measure: MeasureOptions = field(default_factory=lambda: MeasureOptions(measure_every=1))
    run: BriefRunOptions = field(default_factory=BriefRunOptions)


def parse_measure(arguments: Sequence[str]) -> MeasureCommand:
    """Read the arguments of the command: defaults, then the TOML file, then the flags.

    Args:
        arguments: What follows ``measure``.

    Returns:
        The command; the process ends here for ``--help`` and for a flag that does not exist.

    Raises:
        InvalidArgument: A flag is not read beside the other choices, or the file cannot be read.
    """
    command = read_flags("measure", MeasureCommand(), arguments)
    if command.files.config is not None:
        filed = read_settings(command.files.config, Settings())
        chosen = MeasureCommand(
            problem=filed.problem,
            batch=_taken(ConstantBatchOptions(), filed.batch),
            optimizer=filed.optimizer,
            run=replace(_taken(BriefRunOptions(), filed.run), samples=None),
        )
        command = read_flags("measure", chosen, arguments)
    if command.files.checkpoint is not None:
        _refuse_training(arguments)
    # what the augmented test reads is what is measured here
    refuse_unused(_settings(command, policy="augmented", samples=command.run.samples), arguments)
    return command


def settings_to_measure(command: MeasureCommand, samples: int) -> Settings:
    """Return the settings of the run that measures, which ``adadagrad train --config`` can repeat.

    Args:
        command: What the user chose.
        samples: The budget.

    Returns:
        The settings: a constant batch, and with a checkpoint an optimizer that leaves the weights alone.
    """
    settings = _settings(command, policy="constant", samples=samples)
    if command.files.checkpoint is not None:
        return replace(settings, optimizer=OptimizerOptions(optimizer="sgd", lr=0.0, rate="none"))
    if settings.optimizer.rate == "recommended":  # it follows the batch size, which stays
        return replace(settings, optimizer=replace(settings.optimizer, rate="none"))
    return settings


def budget(command: MeasureCommand, dataset_size: int) -> int:
    """Return the samples to train on: what the user says, or enough to see the noise scale change.

    Args:
        command: What the user chose.
        dataset_size: Examples to train on.

    Returns:
        The budget [samples].
    """
    if command.run.samples is not None:
        return command.run.samples
    return max(min(20 * dataset_size, 60_000), 50 * command.batch.global_batch_size)


def _settings(command: MeasureCommand, policy: str, samples: int | None) -> Settings:
    return Settings(
        problem=command.problem,
        batch=_taken(BatchOptions(policy=policy), command.batch),
        optimizer=command.optimizer,
        measure=command.measure,
        run=replace(_taken(RunOptions(), command.run), samples=samples),
    )


def _taken(group: Group, other: Any) -> Group:
    """The group with the values of another one where the names are the same."""
    names = {option.name for option in dataclasses.fields(group)} & {
        option.name for option in dataclasses.fields(other)
    }
    return replace(group, **{name: getattr(other, name) for name in names})


def _refuse_training(arguments: Sequence[str]) -> None:
    """Refuse flags of a training beside weights that are to stand still."""
    names = {f"--{option.name.replace('_', '-')}" for option in dataclasses.fields(OptimizerOptions)}
    typed = [word.partition("=")[0].replace("_", "-") for word in arguments]
    for flag in typed:
        if flag in names:
            raise InvalidArgument(
                f"{flag} is not used with --checkpoint, whose weights are measured as they are: leave it out"
            )
