"""``adadagrad completion bash``: what makes a shell finish commands, flags and the names that they take.

The script is written from the same records that the flags are made of, so that it knows every flag; while the shell
runs it needs nothing of this library, and the key costs no import. Load it with

    source <(adadagrad completion bash)        # in ~/.bashrc to keep it
    source <(adadagrad completion zsh)         # in ~/.zshrc, after compinit
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from importlib import import_module
from typing import Any, Literal, get_args, get_origin, get_type_hints

SHELLS = ("bash", "zsh")
RECORDS = {
    "train": ("arguments", "TrainCommand"),
    "compare": ("arguments", "CompareCommand"),
    "measure": ("measure_arguments", "MeasureCommand"),
    "federated": ("federated_arguments", "FederatedCommand"),
    "perturb": ("perturb", "PerturbCommand"),
    "detect": ("detect", "DetectCommand"),
}
"""The commands whose flags are the fields of a record, and where it is."""

PLAIN: Mapping[str, Mapping[str, Sequence[str] | None]] = {
    "report": {"--out": ()},
    "watch": {"--host": (), "--port": (), "--open": None},
    "completion": {},
}
"""The flags of the others, as `command_flags` returns them."""

FUNCTION = """\
_adadagrad() {
    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" command="${COMP_WORDS[1]}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="%(commands)s"
    else
        case "$command $before" in
%(values)s
            *)
                case "$command" in
%(flags)s
                esac ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o default -F _adadagrad adadagrad
"""
ZSH = "#compdef adadagrad\nautoload -U +X bashcompinit && bashcompinit\n"


def main(arguments: Sequence[str]) -> int:
    """Print the script for a shell.

    Args:
        arguments: The name of the shell.

    Returns:
        The exit status, 0.
    """
    parser = argparse.ArgumentParser(
        prog="adadagrad completion",
        description="Print a script that makes the shell finish commands, flags and names: "
        "source <(adadagrad completion bash)",
    )
    parser.add_argument("shell", choices=SHELLS)
    print(script(parser.parse_args(arguments).shell), end="")
    return 0


def script(shell: str) -> str:
    """Return the script for a shell.

    Args:
        shell: ``"bash"``, or ``"zsh"``, which runs the same function through its own emulation.

    Returns:
        The text to source.
    """
    from adadagrad.cli import COMMANDS

    known = {command: command_flags(command) for command in COMMANDS}
    values = [f'"completion completion") words="{" ".join(SHELLS)}" ;;']
    for command, taken in known.items():
        values += [
            f'"{command} {flag}") words="{" ".join(names)}" ;;' for flag, names in taken.items() if names is not None
        ]
    flags = [f'{command}) words="{" ".join([*taken, "--help"])}" ;;' for command, taken in known.items()]
    function = FUNCTION % {
        "commands": " ".join(known),
        "values": "\n".join(" " * 12 + line for line in values),
        "flags": "\n".join(" " * 20 + line for line in flags),
    }
    return (ZSH if shell == "zsh" else "") + function


def command_flags(command: str) -> Mapping[str, Sequence[str] | None]:
    """Return what may follow a command.

    Args:
        command: Its name.

    Returns:
        Its flags; for each the names that may follow it, none where anything may, or None where nothing does.
    """
    if command in PLAIN:
        return PLAIN[command]
    module, record = RECORDS[command]
    groups = fields(getattr(import_module(f"adadagrad.cli.{module}"), record))
    return dict(flag for group in groups for flag in _flags(command, group.default_factory))


def _flags(command: str, make_group: Any) -> Iterator[tuple[str, Sequence[str] | None]]:
    """The flags of one group of options, of which the record's own function makes the defaults."""
    group = type(make_group())
    types = get_type_hints(group)
    for option in fields(group):
        flag = f"--{option.name.replace('_', '-')}"
        named = _tables().get((command, option.name)) or _tables().get(("", option.name))
        if named is not None:
            yield flag, list(named())
        elif types[option.name] is bool:
            yield flag, None
        else:
            yield flag, [str(name) for name in _literals(types[option.name])]


def _literals(annotation: Any) -> Iterator[object]:
    """The values of every ``Literal`` in a type."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for part in get_args(annotation):
            yield from _literals(part)


def _tables() -> Mapping[tuple[str, str], Callable[[], Sequence[str]]]:
    """Where the names are that an option takes: by command and option, "" for all other commands."""
    return {
        ("", "data"): lambda: ("digits",),
        ("", "device"): lambda: ("cpu", "cuda"),
        ("", "policy"): lambda: ("recommended", *_keys("names", "POLICIES")),
        ("", "model"): partial(_keys, "names", "MODELS"),
        ("", "lr_schedule"): partial(_keys, "names", "SCHEDULES"),
        ("", "optimizer"): partial(_keys, "optimizers", "OPTIMIZERS"),
        ("", "track"): partial(_keys, "tracking", "TRACKERS"),
        ("", "rate"): lambda: ("recommended", *_keys("rates", "RATES")),
        ("federated", "server"): partial(_keys, "federated_arguments", "SERVERS"),
        ("detect", "policies"): partial(_keys, "detect", "POLICIES"),
    }


def _keys(module: str, table: str) -> Sequence[str]:
    """The names in a table of the command line, which is imported only here."""
    return tuple(getattr(import_module(f"adadagrad.cli.{module}"), table))
