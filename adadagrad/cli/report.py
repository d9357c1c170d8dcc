"""``adadagrad report``: the table and page of runs that are there, finished or not."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from adadagrad.cli.directory import REPORT_NAME
from adadagrad.core.errors import CorruptLog, InvalidArgument
from adadagrad.report.page import write_report
from adadagrad.report.reader import read_runs
from adadagrad.report.table import comparison_table, table_text


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Args:
        arguments: What follows ``report``.

    Returns:
        The exit status: 0, or 2 where a broken log was left out.

    Raises:
        InvalidArgument: The page cannot be written where the user wants it.
    """
    parser = argparse.ArgumentParser(
        prog="adadagrad report", description="Print the table of runs and write one self-contained HTML page."
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN_DIR",
        help="run directory, a folder of run directories, or a run.jsonl; also of a run that was stopped",
    )
    parser.add_argument(
        "-o", "--out", type=Path, metavar="FILE", help=f"the page (default: {REPORT_NAME} in the first RUN_DIR)"
    )
    options = parser.parse_args(arguments)
    left_out: list[CorruptLog] = []
    runs = read_runs(options.runs, left_out)
    for error in left_out:
        print(f"adadagrad: left out, {error}", file=sys.stderr)
    print(table_text(comparison_table(runs)))
    first = options.runs[0]
    out = options.out or (first if first.is_dir() else first.parent) / REPORT_NAME
    try:
        print(f"report: {write_report(runs, out)}")
    except OSError as error:
        raise InvalidArgument(f"--out {out} cannot be written: {error.strerror or error}") from error
    return 2 if left_out else 0
