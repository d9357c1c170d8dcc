"""A user's own function by its name, ``package.module:function``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from adadagrad.core.errors import InvalidArgument, UnknownName


def is_object_name(spec: str) -> bool:
    """Say whether a name has the form ``package.module:function``.

    Args:
        spec: Any name.

    Returns:
        True for two parts around one colon, each made of identifiers.

    Example:
        >>> is_object_name("mytask.data:load"), is_object_name("mlp"), is_object_name("mnist:/data")
        (True, False, False)
    """
    module, colon, function = spec.partition(":")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def call_object(spec: str, what: str) -> Any:
    """Import a function and call it without arguments. The current folder is searched too.

    Args:
        spec: ``package.module:function``.
        what: What it stands for, for messages: ``"data"`` or ``"model"``.

    Returns:
        Whatever the function returns; an error inside it passes through.

    Raises:
        InvalidArgument: The module cannot be imported, or the name in it cannot be called.
        UnknownName: The module has no such name; the message lists the nearest.
    """
    module_name, _, name = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InvalidArgument(
            f"--{what} {spec}: cannot import {module_name} ({error}): run from the folder that holds it, or install it"
        ) from error
    if name not in vars(module):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UnknownName(f"function in {module_name}", name, public)
    function = vars(module)[name]
    if not callable(function):
        raise InvalidArgument(f"--{what} {spec} must be a function, got {type(function).__name__}")
    return function()
