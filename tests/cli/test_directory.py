"""Which directory a run gets, and which ones are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from adadagrad.cli.directory import new_directory
from adadagrad.core.errors import InvalidArgument


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_numbered_directories(folder: Path) -> None:
    assert str(new_directory(None, "train")) == "runs/train-001"
    (folder / "runs" / "train-007").mkdir()
    (folder / "runs" / "train-old").mkdir()
    assert str(new_directory(None, "train")) == "runs/train-008"
    assert str(new_directory(None, "compare")) == "runs/compare-001"


def test_a_directory_with_something_in_it_is_refused(folder: Path) -> None:
    (folder / "empty").mkdir()
    assert new_directory(Path("empty"), "train") == Path("empty")
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    for out in ("full", "full/notes.txt"):
        with pytest.raises(InvalidArgument, match=f"--out {out} is not an empty folder"):
            new_directory(Path(out), "train")
    with pytest.raises(InvalidArgument, match=r"--out full/notes\.txt/run cannot be made"):
        new_directory(Path("full/notes.txt/run"), "train")
