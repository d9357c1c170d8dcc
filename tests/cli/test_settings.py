"""Settings survive TOML, and come in order: defaults, file, flags."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from adadagrad.cli.arguments import CompareCommand, TrainCommand, parse, settings_of
from adadagrad.cli.compare import compared_settings
from adadagrad.cli.config import (
    BatchOptions,
    MeasureOptions,
    OptimizerOptions,
    PolicyOptions,
    ProblemOptions,
    RunOptions,
    Settings,
)
from adadagrad.cli.toml_file import read_settings, settings_toml
from adadagrad.core.errors import InvalidArgument, MissingExtra, UnknownName

pytest.importorskip("tyro")

UNUSUAL = Settings(
    problem=ProblemOptions(data='mnist:C:\\da"ta\n\x7f é 数', model="cnn"),
    batch=BatchOptions(policy="staged", max_batch_size=4096, max_growth=1.5, on_infinite="cap", confidence=0.75),
    policy=PolicyOptions(eta=1e-05, stages="0:256 1M:1024", reduction="weighted"),
    optimizer=OptimizerOptions(lr=1e20, lr_milestones="1:2", max_grad_norm=0.1),
    measure=MeasureOptions(measure_every=7, max_examples="all"),
    run=RunOptions(samples=12, seed=-3),
)


@pytest.mark.parametrize("settings", [Settings(), UNUSUAL, settings_of(CompareCommand())])
def test_toml_round_trip(tmp_path: Path, settings: Settings) -> None:
    path = tmp_path / "config.toml"
    path.write_text(settings_toml(settings), encoding="utf-8")
    assert read_settings(path, Settings()) == settings


def test_defaults_then_file_then_flags(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[policy]\neta = 1\ntheta = 0.1\n[run]\nseed = 5\n[measure]\nmeasure_every = "auto"\n')
    flags = ["--policy", "norm", "--eta", "0.3", "--max-growth", "2"]
    command = parse("train", TrainCommand(), ["--config", str(path), *flags])
    assert command.policy == PolicyOptions(eta=0.3, theta=0.1)
    assert command.run == RunOptions(seed=5)
    assert command.batch == BatchOptions(policy="norm", max_growth=2.0)
    assert command.files.config == path


def test_a_whole_number_becomes_a_float_where_one_is_meant(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[optimizer]\nlr = 1\nmax_grad_norm = 2\n")
    settings = read_settings(path, Settings())
    assert isinstance(settings.optimizer.lr, float)
    assert isinstance(settings.optimizer.max_grad_norm, float)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("[polcy]\neta = 1\n", UnknownName, r"unknown table in .*run\.toml 'polcy': did you mean policy"),
        ("[policy]\netta = 1\n", UnknownName, r"unknown key of \[policy\] in .* 'etta': did you mean eta"),
        ("policy = 3\n", InvalidArgument, r"policy in .* must be a table, got 3: write \[policy\]"),
        ('[policy]\neta = "small"\n', InvalidArgument, r"eta of \[policy\] in .* must be a number, got 'small'"),
        ("[run]\nepochs = true\n", InvalidArgument, r"epochs of .* must be an integer, got True"),
        ("[run]\nepochs = 1.5\n", InvalidArgument, r"epochs of .* must be an integer, got 1\.5"),
        ("[run]\nsamples = 1.5\n", InvalidArgument, r"samples of .* must be an integer, got 1\.5"),
        ('[batch]\non_infinite = "stop"\n', InvalidArgument, r'must be "hold" or "cap", got \'stop\''),
        ('[measure]\nmeasure_every = "often"\n', InvalidArgument, r'must be an integer or "auto", got \'often\''),
        ("[run\n", InvalidArgument, r"is not TOML"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(error, match=message):
        read_settings(path, Settings())


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="cannot be read: No such file"):
        read_settings(tmp_path / "none.toml", Settings())
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidArgument, match="is not TOML"):
        read_settings(tmp_path / "bytes.toml", Settings())


def test_the_four_runs_differ_in_batch_sizes_and_rates_alone() -> None:
    runs = compared_settings(parse("compare", CompareCommand(), ["--max-growth", "3", "--min-batch-size", "8"]))
    assert {name: (run.batch.policy, run.batch.global_batch_size) for name, run in runs.items()} == {
        "constant-16": ("constant", 16),
        "constant-512": ("constant", 512),
        "paper-norm": ("norm", 16),
        "recommended": ("recommended", 16),
    }
    paper = runs["paper-norm"]
    assert (paper.optimizer.rate, paper.batch.max_growth, paper.batch.min_batch_size) == ("none", None, None)
    assert (runs["recommended"].optimizer.rate, runs["recommended"].batch.max_growth) == ("recommended", 3.0)
    batch, rate = BatchOptions(), "none"
    assert {runs[name].batch.min_batch_size for name in ("constant-16", "constant-512")} == {None}
    same = [replace(run, batch=batch, optimizer=replace(run.optimizer, rate=rate)) for run in runs.values()]
    assert len({settings_toml(run) for run in same}) == 1


def test_a_comparison_that_compares_nothing_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="--small-batch-size must be < --large-batch-size, got 64 and 64"):
        compared_settings(parse("compare", CompareCommand(), ["--small-batch-size", "64", "--large-batch-size", "64"]))
    with pytest.raises(InvalidArgument, match="--policy constant is in the comparison already"):
        compared_settings(parse("compare", CompareCommand(), ["--policy", "constant"]))


def test_missing_tyro_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    with pytest.raises(MissingExtra, match=r"tyro is not installed: pip install 'adadagrad\[cli\]'"):
        parse("train", TrainCommand(), [])


def test_resume_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="--resume needs --out"):
        parse("train", TrainCommand(), ["--resume"])
    with pytest.raises(InvalidArgument, match=r"holds no config\.toml"):
        parse("train", TrainCommand(), ["--resume", "--out", str(tmp_path)])
