"""Settings as TOML and back: one table a group, every key checked for its name and its type."""

from __future__ import annotations

import json
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from adadagrad.cli.config import Settings
from adadagrad.core.errors import InvalidArgument, UnknownName

Group = TypeVar("Group")


def settings_toml(settings: Settings) -> str:
    """Write settings as TOML, every value included; what is None is left out, since TOML has no word for it.

    Args:
        settings: The settings.

    Returns:
        The text, which `read_settings` turns into equal settings.
    """
    lines = []
    for table in fields(settings):
        group = getattr(settings, table.name)
        lines.append(f"[{table.name}]")
        for option in fields(group):
            value = getattr(group, option.name)
            if value is not None:
                lines.append(f"{option.name} = {_toml_value(value)}")
        lines.append("")
    return "\n".join(lines)


def read_settings(path: str | Path, base: Settings) -> Settings:
    """Read a TOML file over the settings that hold where it says nothing.

    Args:
        path: The file.
        base: The values of the keys that the file does not have.

    Returns:
        The settings.

    Raises:
        InvalidArgument: The file cannot be read, is not TOML, or a value has the wrong type.
        UnknownName: A table or key does not exist; the message names the nearest.
    """
    path = Path(path)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgument(f"--config {path} cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"--config {path} is not TOML: {error}") from error
    tables = {table.name for table in fields(base)}
    changes: dict[str, Any] = {}
    for name, values in document.items():
        if name not in tables:
            raise UnknownName(f"table in {path}", name, tables)
        if not isinstance(values, dict):
            raise InvalidArgument(f"{name} in {path} must be a table, got {values!r}: write [{name}] above its keys")
        changes[name] = _changed(getattr(base, name), values, f"[{name}] in {path}")
    return replace(base, **changes)


def _changed(group: Group, values: dict[str, Any], where: str) -> Group:
    """The group with the file's values in place of its own."""
    hints = get_type_hints(type(group))
    for key, value in values.items():
        if key not in hints:
            raise UnknownName(f"key of {where}", key, hints)
        if not _fits(value, hints[key]):
            raise InvalidArgument(f"{key} of {where} must be {_in_words(hints[key])}, got {value!r}")
    typed = {key: float(value) if _wants_float(hints[key], value) else value for key, value in values.items()}
    return replace(group, **typed)  # type: ignore[type-var]


def _fits(value: object, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _wants_float(hint: Any, value: object) -> bool:
    """Whether a whole number in the file stands for a float, as in ``lr = 1``."""
    return isinstance(value, int) and not isinstance(value, bool) and float in (hint, *get_args(hint))


def _in_words(hint: Any) -> str:
    words = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_in_words(option) for option in get_args(hint) if option is not NoneType)
    if get_origin(hint) is Literal:
        return " or ".join(json.dumps(option) for option in get_args(hint))
    return words[hint]


def _toml_value(value: str | float | bool) -> str:
    """One value in TOML; a JSON string is a TOML basic string, but for the one character that JSON leaves bare."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
