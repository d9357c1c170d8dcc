"""What a command that is no training run leaves in its directory: choices, one line a row, and a page."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adadagrad.cli.directory import REPORT_NAME
from adadagrad.cli.flags import flags_named
from adadagrad.core.checks import check_integer
from adadagrad.core.errors import InvalidArgument, MissingExtra
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


def check_seed(seed: int) -> None:
    """Refuse a seed that torch does not take.

    Args:
        seed: Of a run.

    Raises:
        InvalidArgument: It is negative, or has more than 63 bits.
    """
    check_integer(0, seed=seed)
    if seed >= 2**63:
        raise InvalidArgument(f"seed must be below 2**63, got {seed}")


def refuse_unread(arguments: Sequence[str], readers: Mapping[str, tuple[bool, str]]) -> None:
    """Refuse flags that change nothing beside the others.

    Args:
        arguments: What the user typed.
        readers: By the option's name: whether something reads it, and what would.

    Raises:
        InvalidArgument: A flag is not read.
    """
    for word in arguments:
        name = word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else ""
        if name in readers and not readers[name][0]:
            flag = name.replace("_", "-")
            raise InvalidArgument(f"--{flag} is not used here: leave it out, or choose {readers[name][1]}")


def _without_nan(value: Any) -> Any:
    """What JSON can say: numbers that are not finite become null, inside lists and mappings too."""
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    lines = [json.dumps(_without_nan(dict(row)), allow_nan=False) + "\n" for row in rows]
    (directory / ROWS_NAME).write_text("".join(lines), encoding="utf-8")
    try:
        print(f"report: {write_sheet(sheet, directory / REPORT_NAME)}")
    except MissingExtra as error:
        print(f"no report: {error}", file=sys.stderr)
