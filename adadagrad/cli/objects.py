"""A user's own function by its name, ``package.module:function``."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adadagrad.cli.own_code import described, own_code
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
        Whatever the function returns.

    Raises:
        InvalidArgument: The module cannot be imported, the name in it cannot be called without arguments, or raises.
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
    except (Exception, SystemExit) as error:
        raise InvalidArgument(f"--{what} {spec}: importing {module_name} raised {described(error)}") from error
    if name not in vars(module):
        own = [key for key, value in vars(module).items() if inspect.getmodule(value) is module and callable(value)]
        raise UnknownName(f"function in {module_name}", name, own)
    function = vars(module)[name]
    if not callable(function):
        raise InvalidArgument(f"--{what} {spec} must be a function, got {type(function).__name__}")
    needed = _needed_arguments(function)
    if needed:
        raise InvalidArgument(f"--{what} {spec} is called without arguments, but needs {', '.join(needed)}")
    with own_code(f"--{what} {spec}, called without arguments,"):
        return function()


def _needed_arguments(function: Callable[..., Any]) -> list[str]:
    """Names of the parameters without a default; none where Python cannot say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in optional]
