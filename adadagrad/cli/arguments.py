"""Command line arguments become settings: defaults, then the TOML file, then the flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from adadagrad.cli.config import (
    BatchOptions,
    MeasureOptions,
    OptimizerOptions,
    PolicyOptions,
    ProblemOptions,
    RunOptions,
    Settings,
)
from adadagrad.cli.toml_file import read_settings
from adadagrad.cli.unused import refuse_unused
from adadagrad.core.errors import InvalidArgument, MissingExtra

CONFIG_NAME = "config.toml"
PAPER_OPTIONS = ("eta", "finite_population", "measure_every", "max_examples")
"""What the paper's run of a comparison reads, beside whatever policy it is compared with."""
Command = TypeVar("Command", "TrainCommand", "CompareCommand")
Choices = TypeVar("Choices")


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """Files: where settings come from and results go.

    Args:
        config: A TOML file of settings, such as a run's config.toml; flags override it.
        out: Run directory to make; without it a numbered one under runs/.
        resume: Continue the run in --out from its last checkpoint, with its settings; only how long and where it
            runs may change (epochs, samples, evaluations, checkpoints, device, threads).
        track: Also log to a tracker: tensorboard, wandb, mlflow, trackio or prometheus; repeat the flag for several,
            and on --resume. After a colon: the folder (tensorboard, prometheus) or the project, as in mlflow:digits.
    """

    config: Path | None = None
    out: Path | None = None
    resume: bool = False
    track: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ComparisonFiles:
    """Files: where settings come from and results go.

    Args:
        config: A TOML file of settings; flags override it.
        out: Directory to make for the runs and the report; without it a numbered one under runs/.
    """

    config: Path | None = None
    out: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions:
    """The constant batches that the policy is compared with.

    Args:
        small_batch_size: Batch size of the first run.
        large_batch_size: Batch size of the second run.
    """

    small_batch_size: int = 16
    large_batch_size: int = 512


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Train one model and leave its settings, log, checkpoint and report in a run directory."""

    files: FileOptions = field(default_factory=FileOptions)
    problem: ProblemOptions = field(default_factory=ProblemOptions)
    batch: BatchOptions = field(default_factory=BatchOptions)
    policy: PolicyOptions = field(default_factory=PolicyOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    measure: MeasureOptions = field(default_factory=MeasureOptions)
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(frozen=True, kw_only=True)
class CompareCommand:
    """Train one model four times: with a small constant batch, a large one, the paper's norm test, and another policy.

    All start from the same weights and use the same number of samples. A table is printed and one report is
    written. The default learning rate was chosen for the small constant batch on digits. Noise is measured at each
    step; the paper's test corrects it for batches that are a good part of a small data set.
    """

    files: ComparisonFiles = field(default_factory=ComparisonFiles)
    comparison: ComparisonOptions = field(default_factory=ComparisonOptions)
    problem: ProblemOptions = field(default_factory=ProblemOptions)
    batch: BatchOptions = field(default_factory=lambda: BatchOptions(global_batch_size=16, micro_batch_size=2048))
    policy: PolicyOptions = field(default_factory=lambda: PolicyOptions(eta=0.5, finite_population="current"))
    optimizer: OptimizerOptions = field(default_factory=lambda: OptimizerOptions(lr=0.05))
    measure: MeasureOptions = field(default_factory=lambda: MeasureOptions(measure_every=1))
    run: RunOptions = field(default_factory=lambda: RunOptions(epochs=50))


def settings_of(command: TrainCommand | CompareCommand) -> Settings:
    """Return the part of a command that describes a run and goes into its ``config.toml``."""
    return Settings(**{group.name: getattr(command, group.name) for group in dataclasses.fields(Settings)})


def parse(name: str, default: Command, arguments: Sequence[str]) -> Command:
    """Read one command's arguments.

    Args:
        name: The command's name, for its help.
        default: Values of what neither the file nor the flags give.
        arguments: What follows the command's name.

    Returns:
        The command; the process ends here for ``--help`` and for a flag that does not exist.

    Raises:
        MissingExtra: tyro is not installed.
        InvalidArgument: A flag is not read beside the other choices, or there is no run to resume.
    """
    command = read_flags(name, default, arguments, repeatable=True)
    path = _settings_file(command)
    if path is not None:
        filed = read_settings(path, settings_of(default))
        groups = {group.name: getattr(filed, group.name) for group in dataclasses.fields(filed)}
        command = read_flags(name, dataclasses.replace(default, **groups), arguments, repeatable=True)
    refuse_unused(settings_of(command), arguments, also=PAPER_OPTIONS if isinstance(command, CompareCommand) else ())
    return command


def read_flags(name: str, default: Choices, arguments: Sequence[str], *, repeatable: bool = False) -> Choices:
    """Read flags over the values that hold without them.

    Args:
        name: The command's name, for its help.
        default: A record of records, whose fields are the flags.
        arguments: What follows the command's name.
        repeatable: A flag of several values is given once for each, not once with all of them behind it.

    Returns:
        The same kind of record; the process ends here for ``--help`` and for a flag that does not exist.

    Raises:
        MissingExtra: tyro is not installed.
    """
    try:
        import tyro
    except ImportError as error:
        raise MissingExtra("tyro", "cli") from error
    markers: Any = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    markers += (tyro.conf.UseAppendAction,) if repeatable else ()
    return tyro.cli(type(default), prog=f"adadagrad {name}", args=list(arguments), default=default, config=markers)


def _settings_file(command: TrainCommand | CompareCommand) -> Path | None:
    """The file that settings come from: the one named, or that of the run to continue."""
    files = command.files
    if isinstance(files, FileOptions) and files.resume:
        if files.out is None:
            raise InvalidArgument("--resume needs --out: the run directory to continue")
        if not (files.out / CONFIG_NAME).is_file():
            raise InvalidArgument(f"--resume: {files.out} holds no {CONFIG_NAME}, so there is no run to continue")
        return files.config or files.out / CONFIG_NAME
    return files.config
