"""The completion scripts: a bash that has sourced one finishes commands, flags and names; no flag is missing."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from adadagrad.cli import COMMANDS, main
from adadagrad.cli.completion import PLAIN, RECORDS, command_flags, script

pytest.importorskip("tyro")


def completed(typed: str) -> list[str]:
    """What a shell that has sourced the script offers for the last word of a line."""
    words = typed.split(" ")
    lines = [
        script("bash"),
        f"COMP_WORDS=({' '.join(repr(word) for word in words)})",
        f"COMP_CWORD={len(words) - 1}",
        "complete -p adadagrad >&2 && _adadagrad",
        'printf "%s\\n" "${COMPREPLY[@]}"',
    ]
    shell = ["bash", "--norc", "-c", "\n".join(lines)]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == "complete -o default -F _adadagrad adadagrad\n"
    return done.stdout.split()


def help_flags(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = capsys.readouterr().out
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*(?= |,|$)", re.sub(r"(?m)^ *usage.*$", "", text))) - {"--help"}


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("adadagrad tr", ["train"]),
        ("adadagrad ", [*COMMANDS]),
        ("adadagrad train --global", ["--global-batch-size"]),
        ("adadagrad train --policy no", ["norm", "noise-scale"]),
        ("adadagrad train --eta 0.1 --optimizer adag", ["adagrad", "adagrad-norm", "adagrad-ota"]),
        ("adadagrad train --track t", ["tensorboard", "trackio"]),
        ("adadagrad train --rate ada", ["adascale", "adamscale"]),
        ("adadagrad measure --on-nonfinite s", ["skip", "stop"]),
        ("adadagrad federated --server fed", ["fedavg", "fedavgm"]),
        ("adadagrad detect --policies th", ["threshold"]),
        ("adadagrad train --resume --see", ["--seed"]),
        ("adadagrad completion ", ["bash", "zsh"]),
        ("adadagrad train --config ", []),  # a file: the shell's own completion, which finds no list here
        ("adadagrad report ", ["--out", "--help"]),
        ("adadagrad nonsense ", []),
    ],
)
def test_what_bash_offers(typed: str, offered: list[str]) -> None:
    assert completed(typed) == offered


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_the_help_is_offered_and_no_other(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(command_flags(command)) == help_flags(command, capsys)


def test_every_command_has_one_row() -> None:
    assert set(COMMANDS) <= {*RECORDS, *PLAIN}
    assert not {*RECORDS} & {*PLAIN}


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_script_that_the_command_prints_parses(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    printed = capsys.readouterr().out
    assert printed == script(shell)
    assert printed.startswith("#compdef adadagrad\n") == (shell == "zsh")
    (tmp_path / "script").write_text(printed)
    for checker in {"bash", shell}:  # the function of the other shell is the same text
        if shutil.which(checker):
            done = subprocess.run([checker, "-n", str(tmp_path / "script")], capture_output=True, timeout=60)
            assert (done.returncode, done.stderr) == (0, b"")


def test_a_shell_that_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["completion", "csh"])
    assert "invalid choice: 'csh' (choose from" in capsys.readouterr().err
