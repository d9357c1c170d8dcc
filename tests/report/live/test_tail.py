"""New lines of a file, whole ones, each once; from the beginning again where the file was cut back."""

from __future__ import annotations

from pathlib import Path

import pytest

from adadagrad.report.live.tail import Tail


def test_lines_come_once_and_half_a_line_waits(tmp_path: Path) -> None:
    path = tmp_path / "log"
    tail = Tail(path)
    assert tail.read() == ([], False)
    path.write_bytes(b"one\ntw")
    assert tail.read() == ([b"one"], False)
    assert tail.read() == ([], False)
    path.write_bytes(b"one\ntwo\n\nfour\n")
    assert tail.read() == ([b"two", b"", b"four"], False)


@pytest.mark.parametrize("now", [b"", b"one\n", b"one\nTWO\nthree\nfour\n"], ids=["empty", "shorter", "grown past it"])
def test_a_file_that_was_cut_back_begins_anew(tmp_path: Path, now: bytes) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\n")
    tail = Tail(path)
    tail.read()
    path.write_bytes(now)
    assert tail.read() == (now.split(b"\n")[:-1], True)
    assert tail.read() == ([], False)


def test_a_file_that_was_taken_away_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\n")
    tail = Tail(path)
    tail.read()
    path.unlink()
    assert tail.read() == ([], True)
    assert tail.read() == ([], False)
    path.write_bytes(b"one\n")
    assert tail.read() == ([b"one"], False)


def test_a_long_file_is_read_bit_by_bit(tmp_path: Path) -> None:
    path = tmp_path / "log"
    lines = [f"line {number}".encode() for number in range(1000)]
    path.write_bytes(b"\n".join(lines) + b"\n")
    found, looks = [], 0
    tail = Tail(path, most=1000)
    while looks == 0 or tail.more:
        new, again = tail.read()
        assert not again
        found += new
        looks += 1
    assert found == lines
    assert 8 <= looks <= 12
    assert Tail(path).read() == (lines, False)
