"""Errors in the words of the command line: the library's ``max_batch_size`` is the user's ``--max-batch-size``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

from adadagrad.cli.config import Settings
from adadagrad.core.errors import AdadagradError

RENAMED = {
    "total_samples": "samples",
    "every": "measure-every",
    "floor": "lr-floor",
    "milestones": "lr-milestones",
    "start": "global-batch-size",
    "end": "end-batch-size",
    "scale": "cabs-scale",
    "base_warmup_epochs": "legw-epochs",
    "alpha": "power",
}
"""The library's arguments whose flag is not called after them; all others are, with hyphens."""

PYTHON_ONLY = (" (or None for no limit)", ", or None for each step by itself")
"""Remedies that nobody can type: on the command line the flag is left out."""


def option_names() -> list[str]:
    """Return the name of every setting that is a flag, as in ``config.toml``."""
    return [option.name for group in fields(Settings) for option in fields(group.default_factory)]  # type: ignore[arg-type]


def in_flags(message: str, /, **renamed: str) -> str:
    """Say an error of the library with the flags that the user typed.

    A name of several words is always an argument; a single word is one where a value or a bound follows or precedes
    it, so that "every" and "start" stay words elsewhere.

    Args:
        message: The library's message.
        **renamed: Flags, without the hyphens in front, that stand for an argument in this place alone.

    Returns:
        The message with flags in place of arguments.

    Example:
        >>> in_flags("max_batch_size must be >= global_batch_size, got max_batch_size=8 and global_batch_size=16")
        '--max-batch-size must be >= --global-batch-size, got --max-batch-size 8 and --global-batch-size 16'
        >>> in_flags("every must be >= 1, got 0: measure every step")
        '--measure-every must be >= 1, got 0: measure every step'
    """
    flags = {name: name.replace("_", "-") for name in option_names()} | RENAMED | renamed
    text = message
    for remedy in PYTHON_ONLY:
        text = text.replace(remedy, "")
    for name, flag in flags.items():
        argument = rf"(?<![\w(/.-]){name}\b"
        text = re.sub(rf"{argument}=[\"']?(\w+)[\"']?", rf"--{flag} \1", text)
        if "_" in name or name in ("milestones", "stages"):
            text = re.sub(argument, f"--{flag}", text)
        else:
            text = re.sub(rf"{argument}(?= must be)", f"--{flag}", text)
            text = re.sub(rf"(?<=[<>=] ){name}\b", f"--{flag}", text)
    return text


@contextmanager
def flags_named(**renamed: str) -> Iterator[None]:
    """Inside its context, or in a function that it decorates, the library's errors name flags.

    Args:
        **renamed: As for `in_flags`.

    Yields:
        Nothing.

    Raises:
        AdadagradError: The same error, its message in the user's words.
    """
    try:
        yield
    except AdadagradError as error:
        error.args = (in_flags(str(error), **renamed),)
        raise
