"""docs/trackers.md and docs/watch.md: their tables name what there is, and their commands and flags exist."""

from __future__ import annotations

import re

import pytest

from adadagrad.cli import main
from adadagrad.cli.arguments import TrainCommand, parse
from adadagrad.cli.tracking import TRACKERS, check_trackers
from adadagrad.cli.watch import PORT
from tests.docs.pages import DOCS, blocks, read


def commands(page: str) -> list[list[str]]:
    return [words for block in blocks(page) for words in block.commands]


def test_its_table_names_every_tracker() -> None:
    text = read("trackers.md")
    assert re.findall(r"^\| `--track (\w+)` \| (\S+) \|", text, re.MULTILINE) == [
        (name, "none" if name == "prometheus" else f"`{name}`") for name in TRACKERS
    ]
    (words,) = commands("trackers.md")
    assert words[0] == "train"
    check_trackers(parse("train", TrainCommand(), words[1:]).files.track)


def test_the_table_of_watch_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jinja2")
    text = read("watch.md")
    with pytest.raises(SystemExit):
        main(["watch", "--help"])
    known = set(re.findall(r"--[a-z]+", capsys.readouterr().out))
    assert set(re.findall(r"`(--[a-z]+)", text)) == known - {"--help"}
    assert text.count(str(PORT)) == 4
    assert all(words[0] == "watch" for words in commands("watch.md"))


def test_its_picture_is_small() -> None:
    assert 20_000 < (DOCS / "pictures" / "watch.png").stat().st_size < 150_000
