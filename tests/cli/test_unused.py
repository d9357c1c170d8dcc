"""Flags that nothing reads are refused, and the table that says so is the code's own."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adadagrad.cli.arguments import CompareCommand, TrainCommand, parse
from adadagrad.cli.config import BatchOptions, OptimizerOptions, PolicyOptions
from adadagrad.cli.names import POLICIES, SCHEDULES
from adadagrad.cli.optimizers import OPTIMIZERS
from adadagrad.cli.rates import RATES
from adadagrad.cli.unused import READERS, TESTS
from adadagrad.core.errors import InvalidArgument
from tests.policies.test_recorded import START, write

pytest.importorskip("tyro")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--eta 0.3 --policy constant", "--eta is not used with --policy constant: .* --policy norm or coordinate"),
        ("--eta=0.25 --policy augmented", "--eta is not used with --policy augmented"),
        ("--theta 0.5", "--theta is not used with --policy recommended: .* --policy inner-product or augmented"),
        ("--policy coordinate --quantile 0.5", "--quantile is not used with --reduction max: .* --reduction quantile"),
        ("--policy staged --stages 0:8 --global-batch-size 8", "--global-batch-size is not used with --policy staged"),
        (
            "--policy augmented --confidence 0.9",
            "--confidence is not used with --policy augmented: .* or norm",
        ),
        ("--policy constant --measure-every 2", "--measure-every is not used with --policy constant"),
        ("--measure-every 2 --max-overhead 0.1", "--max-overhead is not used with --measure-every 2"),
        ("--rate adascale --measure-every 2 --max-overhead 0.1", "--max-overhead is not used with --measure-every 2"),
        ("--policy constant --max-overhead 0.1", "--max-overhead is not used with --policy constant"),
        ("--momentum 0.9", "--momentum is not used with --optimizer adagrad: .* --optimizer sgd"),
        ("--fraction 0.5", "--fraction is not used with --policy recommended: .* --policy noise-scale"),
        ("--policy norm --min-batch-size 8", "--min-batch-size is not used with --policy norm"),
        ("--smoothing 0.9", "--smoothing is not used with --rate recommended: .* --rate adascale or adamscale or"),
        ("--rate none --base-batch-size 8", "--base-batch-size is not used with --rate none"),
        ("--rate sqrt --legw-epochs 2", "--legw-epochs is not used with --rate sqrt: .* --rate legw"),
        ("--warmup-samples 10", "--warmup-samples is not used with --lr-schedule constant"),
        ("--samples 100 --epochs 3", "--epochs is not used beside --samples 100"),
    ],
)
def test_a_flag_that_changes_nothing_is_refused(arguments: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        parse("train", TrainCommand(), arguments.split())


def test_compare_is_checked_too() -> None:
    with pytest.raises(InvalidArgument, match="--nu is not used with --policy recommended"):
        parse("compare", CompareCommand(), ["--nu", "3"])


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "--policy norm --eta 0.3",
        "--policy coordinate --reduction quantile --quantile 0.5",
        "--optimizer sgd --momentum 0.9",
        "--policy constant --rate adascale --measure-every 2 --smoothing 0.9",
        "--policy constant --rate adascale --max-overhead 0.1",
        "--rate linear --base-batch-size 32",
    ],
)
def test_a_flag_that_is_read_is_let_through(arguments: str) -> None:
    command = parse("train", TrainCommand(), arguments.split())
    named = re.search(r"--policy (\S+)", arguments)
    assert command.batch.policy == (named[1] if named else "recommended")


def test_a_settings_file_may_hold_what_nothing_reads(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[batch]\npolicy = 'constant'\n[policy]\neta = 0.1\n[run]\nsamples = 64\n")
    parse("train", TrainCommand(), ["--config", str(path)])
    with pytest.raises(InvalidArgument, match="--epochs is not used beside --samples 64"):
        parse("train", TrainCommand(), ["--config", str(path), "--epochs", "3"])


class _Watched:
    """Options that remember which of them were read."""

    def __init__(self, options: Any) -> None:
        self.options, self.read = options, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return getattr(self.options, name)


def _allowed(decider: str, choice: str, group: type) -> set[str]:
    mine = {option.name for option in fields(group)}
    return {name for name, (by, values) in READERS.items() if by == decider and choice in values} & mine


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_table_says_what_each_policy_reads(policy: str, tmp_path: Path) -> None:
    write(tmp_path, START)
    options = PolicyOptions(stages="0:8", plan=str(tmp_path), end_batch_size=64, ramp_samples=100, every_samples=10)
    watched = _Watched(options)
    POLICIES[policy](BatchOptions(policy=policy), watched)  # type: ignore[arg-type]
    assert watched.read == _allowed("policy", policy, PolicyOptions)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_the_table_says_what_each_optimizer_reads(optimizer: str) -> None:
    watched = _Watched(OptimizerOptions())
    OPTIMIZERS[optimizer](nn.Linear(2, 2).parameters(), watched)  # type: ignore[arg-type]
    assert watched.read == {"lr", "weight_decay"} | _allowed("optimizer", optimizer, OptimizerOptions)


@pytest.mark.parametrize("rate", sorted(RATES))
def test_the_table_says_what_each_rate_reads(rate: str) -> None:
    watched = _Watched(OptimizerOptions())
    RATES[rate](torch.optim.Adam(nn.Linear(2, 2).parameters()), watched)  # type: ignore[arg-type]
    assert watched.read == _allowed("rate", rate, OptimizerOptions)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_the_table_says_what_each_schedule_reads(schedule: str) -> None:
    watched = _Watched(OptimizerOptions(lr_milestones="1:0.5"))
    SCHEDULES[schedule](watched)  # type: ignore[arg-type]
    assert watched.read == _allowed("lr_schedule", schedule, OptimizerOptions)


def test_the_help_says_in_brackets_what_the_table_says() -> None:
    entries = re.findall(r"^ {8}(\w+): (.*?)(?=^ {8}\w+: |\Z)", str(PolicyOptions.__doc__), re.MULTILINE | re.DOTALL)
    said = {name: re.findall(r"\[(.*)\]", text)[0] for name, text in entries}
    assert set(said) == {option.name for option in fields(PolicyOptions)}
    for name, (decider, values) in READERS.items():
        if name in said and decider == "policy":
            named = TESTS if said[name] == "all tests" else re.findall(r"[a-z-]{4,}", said[name])
            assert set(named) - {"needed"} == set(values)
