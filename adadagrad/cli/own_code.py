"""What is said when a user's own data set or model raises: what, where, and under which flag, in one line."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import adadagrad
from adadagrad.core.errors import AdadagradError, InvalidArgument

NOT_THEIRS = (str(Path(adadagrad.__file__).parent), *sysconfig.get_paths().values())
"""Folders of code that the user did not write: this library, Python's and what is installed."""

TRACEBACK_VARIABLE = "ADADAGRAD_TRACEBACK"
"""Environment variable that asks for the whole traceback as well."""


@contextmanager
def own_code(place: str) -> Iterator[None]:
    """Inside its context whatever a user's code raises becomes one line that says where.

    Args:
        place: The flag and what was done with its value, for example ``"--data task:load, called"``.

    Yields:
        Nothing.

    Raises:
        InvalidArgument: The code inside raised, or ended the process.
        AdadagradError: An error of this library passes through as it is.
    """
    try:
        yield
    except AdadagradError:
        raise
    except (Exception, SystemExit) as error:
        raise InvalidArgument(
            f"{place} raised {described(error)}; {TRACEBACK_VARIABLE}=1 in the environment shows the whole traceback"
        ) from error


def described(error: BaseException) -> str:
    """Say what an exception is and where the user's code raised it.

    Args:
        error: Caught, so that it has a traceback.

    Returns:
        For example ``"KeyError: 'x' (task.py, line 12)"``.
    """
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith((*NOT_THEIRS, "<"))]
    where = f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else ""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' + text[0] if text else ''}{where}"
