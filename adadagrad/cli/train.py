"""``adadagrad train``: one run, from settings to a run directory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path

import torch
from torch.nn import functional as F

from adadagrad.cli.arguments import CONFIG_NAME, TrainCommand, parse, settings_of
from adadagrad.cli.building import make_engine
from adadagrad.cli.config import Settings
from adadagrad.cli.data import DataSource, load_data
from adadagrad.cli.directory import CHECKPOINT_NAME, REPORT_NAME, new_directory, remove_if_empty
from adadagrad.cli.evaluation import Evaluator
from adadagrad.cli.flags import flags_named
from adadagrad.cli.interrupt import Interrupt
from adadagrad.cli.objects import is_object_name
from adadagrad.cli.own_code import own_code
from adadagrad.cli.processes import by_the_first, joined
from adadagrad.cli.progress import SilentProgress, progress_display
from adadagrad.cli.resume import refuse_changes, refuse_contradictions
from adadagrad.cli.toml_file import settings_toml
from adadagrad.cli.tracking import check_trackers, tracking
from adadagrad.core.checks import check_integer
from adadagrad.core.errors import MissingExtra
from adadagrad.report.page import write_report
from adadagrad.report.reader import read_runs
from adadagrad.report.table import comparison_table, table_text


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Args:
        arguments: What follows ``train``.

    Returns:
        The exit status: 0, or 130 after Ctrl-C or SIGTERM.
    """
    command = parse("train", TrainCommand(), arguments)
    settings = settings_of(command)
    check_trackers(command.files.track)
    data = load_data(settings.problem.data)
    with joined(settings.run.device) as ranks:
        if command.files.resume:
            assert command.files.out is not None  # parse has seen to that
            directory = command.files.out
        else:
            directory = by_the_first(ranks, lambda: new_directory(command.files.out, "train"))
        try:
            finished = train(settings, data, directory, resume=command.files.resume, track=command.files.track)
        finally:
            if ranks.index == 0:
                remove_if_empty(directory)
    if ranks.index == 0:
        show_results([directory], directory / REPORT_NAME)
        if not finished:
            print(f"stopped: continue with adadagrad train --resume --out {directory}", file=sys.stderr)
    return 0 if finished else 130


@flags_named()
def train(
    settings: Settings, data: DataSource, directory: Path, *, resume: bool = False, track: Sequence[str] = ()
) -> bool:
    """Train one model as the settings say, and write log, checkpoints and settings as it goes.

    On many processes all of them evaluate, each the whole data: none waits longer for another than that takes, and
    what is logged is what the saved model gives, that of rank 0.

    Args:
        settings: All choices.
        data: The data that they name.
        directory: The run directory.
        resume: Continue from the checkpoint in it.
        track: Trackers that follow the run, as ``--track`` names them.

    Returns:
        True where the budget was used, False where Ctrl-C or SIGTERM ended the run early.

    Raises:
        InvalidArgument: A setting is out of range, contradicts another one or the data, or is not the one that
            the run to be continued was begun with.
    """
    check_integer(1, evaluations=settings.run.evaluations, checkpoints=settings.run.checkpoints)
    with threads_of(settings):
        engine = make_engine(settings, data, directory)
        checkpoint = directory / CHECKPOINT_NAME
        if resume:
            refuse_changes(settings, directory)
            refuse_contradictions(engine.total_samples, directory)
            engine.load(checkpoint)
        ranks = engine.parallel.ranks
        with tracking(track if ranks.index == 0 else (), directory, settings) as trackers:
            if ranks.index == 0:
                (directory / CONFIG_NAME).write_text(settings_toml(settings), encoding="utf-8")
            engine.save(checkpoint)
            total, model = engine.total_samples, engine.model
            evaluate = Evaluator(data.held_out, data.split, total, settings.run.evaluations)
            saves = settings.run.checkpoints
            display = progress_display if ranks.index == 0 else SilentProgress
            progress = display(directory.name, total, engine.progress, engine.samples_seen)
            with closing(progress), Interrupt(patient=ranks.count > 1) as interrupt, users_code(settings):
                for step in engine:
                    before = engine.progress
                    step.run(lambda batch: F.cross_entropy(model(batch[0]), batch[1]))
                    engine.stop_requested = interrupt.requested
                    decision = step.update()
                    after = engine.progress
                    if after > before and evaluate.is_due(before, after):
                        began = time.perf_counter()
                        metrics = evaluate(engine.parallel.module)
                        engine.log(metrics)
                        progress.evaluated(metrics, time.perf_counter() - began)
                    progress.step(decision)
                    trackers.step()
                    stop = engine.stop_agreed if ranks.count > 1 else interrupt.requested
                    if stop or after >= total or before * saves // total < after * saves // total:
                        engine.save(checkpoint)
                    if stop:
                        break
            return engine.progress >= total


def users_code(settings: Settings) -> AbstractContextManager[None]:
    """Blame the user's data or model for what is raised while training; nobody where both are ours."""
    named = [
        f"--{flag} {spec}"
        for flag, spec in (("data", settings.problem.data), ("model", settings.problem.model))
        if is_object_name(spec)
    ]
    return own_code(f"{' or '.join(named)}, while training,") if named else nullcontext()


def show_results(runs: Sequence[Path], report: Path) -> None:
    """Print the table of some runs and write their report; without the report's extra, say how to get one.

    Args:
        runs: Run directories; one whose run has not begun is left out.
        report: The HTML file.
    """
    begun = [run for run in runs if (run / "run.jsonl").is_file()]
    if not begun:
        return
    read = read_runs(begun)
    print(table_text(comparison_table(read)))
    try:
        print(f"report: {write_report(read, report)}")
    except MissingExtra as error:
        print(f"no report: {error}", file=sys.stderr)


@contextmanager
def threads_of(settings: Settings) -> Iterator[None]:
    """Train with the chosen number of CPU threads, and give the old number back afterwards.

    Sharing out small matrices costs more than it saves, and twenty times as much where cores are shared.
    """
    check_integer(0, threads=settings.run.threads)
    before = torch.get_num_threads()
    small = settings.problem.data == "digits" or settings.problem.model in ("logistic", "mlp")
    torch.set_num_threads(settings.run.threads or (1 if small else before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
