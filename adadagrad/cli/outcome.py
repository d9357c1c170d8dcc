"""What a command that is no training run leaves in its directory: choices, one line a row, and a page."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adadagrad.cli.directory import REPORT_NAME
from adadagrad.cli.flags import flags_named
from adadagrad.core.errors import MissingExtra
from adadagrad.report.sheet import Sheet, write_sheet

SETTINGS_NAME = "settings.json"
ROWS_NAME = "rows.jsonl"


def choices(command: Any) -> dict[str, Any]:
    """Return all options of a command, by name.

    Args:
        command: A record of records, whose fields are the flags.
    """
    groups = [getattr(command, group.name) for group in dataclasses.fields(command)]
    return {option.name: getattr(group, option.name) for group in groups for option in dataclasses.fields(group)}


@contextmanager
def in_flags_of(command: Any, **renamed: str) -> Iterator[None]:
    """Inside its context the library's errors name the command's flags.

    Args:
        command: The command.
        **renamed: Flags, without the hyphens in front, that stand for an argument of another name.

    Yields:
        Nothing.
    """
    with flags_named(**{name: name.replace("_", "-") for name in choices(command)} | renamed):
        yield


def write_outcome(directory: Path, command: Any, rows: Iterable[Mapping[str, Any]], sheet: Sheet) -> None:
    """Write choices, rows and page; without the report's extra, say how to get a page.

    Args:
        directory: The run directory.
        command: The command.
        rows: Plain values, a line each.
        sheet: What the page holds.
    """
    told = {name: value if isinstance(value, int | float | str | None) else str(value) for name, value in
            choices(command).items()}  # fmt: skip
    (directory / SETTINGS_NAME).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    (directory / ROWS_NAME).write_text("".join(json.dumps(dict(row)) + "\n" for row in rows), encoding="utf-8")
    try:
        print(f"report: {write_sheet(sheet, directory / REPORT_NAME)}")
    except MissingExtra as error:
        print(f"no report: {error}", file=sys.stderr)
