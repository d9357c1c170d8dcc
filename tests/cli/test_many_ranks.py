"""`adadagrad train` under torchrun: one run, one voice, one directory, whatever the number of processes."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from adadagrad.cli import main
from adadagrad.cli import train as train_module
from adadagrad.cli.progress import SilentProgress
from adadagrad.core.records import Decision
from adadagrad.report.reader import read_run
from tests.cli.runs import CONSTANT, PLAIN, records
from tests.ranks import on_ranks

for package in ("tyro", "sklearn", "matplotlib", "jinja2"):
    pytest.importorskip(package)

NORM = [*PLAIN, "--global-batch-size", "16", "--policy", "norm", "--eta", "0.5", "--measure-every", "1"]
NORM += ["--max-examples", "all"]
RUNS = {"constant": CONSTANT, "norm": NORM}


class StopsOneRank(SilentProgress):
    """Sends a signal to this process, which is not the one that speaks, in one step."""

    def step(self, decision: Decision) -> None:
        if decision.step == 10:
            signal.raise_signal(signal.SIGTERM)


def command(arguments: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    return status, out.getvalue(), err.getvalue()


def of_rank(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    found = {name: command(["train", *run, "--out", f"{name}-{ranks}"]) for name, run in RUNS.items()}
    found["replayed"] = command(["train", *PLAIN, "--policy", "recorded", "--plan", "norm-1", "--out", "replayed"])
    if rank == 0:
        train_module.write_report = lambda runs, path: path  # type: ignore[assignment]
    found["numbered"] = command(["train", *CONSTANT])
    found["taken"] = command(["train", *CONSTANT, "--out", "constant-1"])
    found["refused"] = command(["train", *CONSTANT, "--lr", "-1", "--out", "refused"])
    found["compare"], found["measure"] = command(["compare"]), command(["measure"])
    train_module.SilentProgress = StopsOneRank  # type: ignore[misc]
    found["stopped"] = command(["train", *CONSTANT, "--out", f"stopped-{ranks}"])
    train_module.SilentProgress = SilentProgress  # type: ignore[misc]
    found["resumed"] = command(["train", "--resume", "--out", f"stopped-{ranks}"])
    found["more"] = command(["train", "--resume", "--samples", "900", "--out", "constant-1"])
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("runs")
    for name, run in RUNS.items():
        assert main(["train", *run, "--out", str(folder / f"{name}-1")]) == 0
    return folder, on_ranks(2, of_rank, 2, str(folder))


@pytest.mark.parametrize("name", RUNS)
def test_the_run_is_that_of_one_process(results: tuple[Path, list[dict[str, Any]]], name: str) -> None:
    folder, found = results
    assert [rank[name][0] for rank in found] == [0, 0]
    two, one = (read_run(folder / f"{name}-{ranks}") for ranks in (2, 1))
    one_steps = [row for row in one.steps if row.samples_seen <= 600]  # another test trains it further
    assert [row.global_batch_size for row in two.steps] == [row.global_batch_size for row in one_steps]
    assert [row.loss for row in two.steps] == pytest.approx([row.loss for row in one_steps], abs=1e-6)
    assert two.start["ranks"] == 2
    accuracies = [[(row.samples_seen, row.metrics["val/accuracy"]) for row in run.logs] for run in (two, one)]
    assert accuracies[0] == accuracies[1][: len(accuracies[0])]
    assert {path.name for path in (folder / f"{name}-2").iterdir()} == {
        "config.toml",
        "run.jsonl",
        "checkpoint.pt",
        "report.html",
    }


def test_a_recorded_run_comes_again(results: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = results
    assert [rank["replayed"][0] for rank in found] == [0, 0]
    one, two = (read_run(folder / name).steps for name in ("norm-1", "replayed"))
    assert [row.global_batch_size for row in two] == [row.global_batch_size for row in one]
    assert [row.loss for row in two] == pytest.approx([row.loss for row in one], abs=1e-6)


def test_one_process_speaks(results: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (first, second) = results
    for name in RUNS:
        assert f"report: {name}-2" in first[name][1]
        assert " 100% " in first[name][2]
        assert second[name][1:] == ("", "")
    assert (folder / "runs/train-001/run.jsonl").is_file()
    assert len(list((folder / "runs").iterdir())) == 1


def test_what_is_refused_is_refused_on_all(results: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = results
    for rank, answers in enumerate(found):
        whose = f"adadagrad: rank {rank}: " if rank else "adadagrad: "
        for name, message in (
            ("taken", "--out constant-1 is not an empty folder"),
            ("refused", "--lr must be >= 0"),
            ("compare", "adadagrad compare runs in one process, and torchrun has started 2: start it without"),
            ("measure", "adadagrad measure runs in one process, and torchrun has started 2: start it without"),
        ):
            status, out, err = answers[name]
            assert (status, out) == (2, "")
            assert err.startswith(whose + message), err
    assert not (folder / "refused").exists()


def test_a_signal_on_one_rank_stops_all_and_the_run_goes_on(results: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = results
    assert [rank["stopped"][0] for rank in found] == [130, 130]
    assert "stopped: continue with adadagrad train --resume --out stopped-2" in found[0]["stopped"][2]
    assert [rank["resumed"][0] for rank in found] == [0, 0]
    whole, resumed = records(folder / "constant-2"), records(folder / "stopped-2")
    assert [record for record in resumed if record["kind"] != "log"] == [r for r in whole if r["kind"] != "log"]


def test_a_run_goes_on_with_another_number_of_processes(results: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = results
    assert [rank["more"][0] for rank in found] == [0, 0]
    run = read_run(folder / "constant-1")
    assert run.steps[-1].samples_seen == 900
    assert main(["train", "--resume", "--samples", "900", "--out", str(folder / "constant-2")]) == 0
    other = read_run(folder / "constant-2")
    assert [row.samples_seen for row in other.steps] == [row.samples_seen for row in run.steps]
    assert [row.loss for row in other.steps] == pytest.approx([row.loss for row in run.steps], abs=1e-6)


def test_torchrun_and_its_sigterm(tmp_path: Path) -> None:
    """What a batch system does: SIGTERM to torchrun, which passes it on; both processes save and end."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["train", "--data", "digits", "--samples", "100000000", "--global-batch-size", "64", "--out", "run"]
    process = subprocess.Popen(
        [*start, "-m", "adadagrad", *arguments, "--policy", "constant", "--evaluations", "1"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        log, deadline = tmp_path / "run" / "run.jsonl", time.monotonic() + 120
        while not (log.is_file() and log.stat().st_size > 10_000) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        process.kill()
    assert process.returncode != 0
    run = read_run(tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "checkpoint.pt")["engine"]
    assert saved["samples_seen"] == run.steps[-1].samples_seen > 0
    assert (tmp_path / "run" / "report.html").is_file()
