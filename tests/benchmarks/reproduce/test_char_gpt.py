"""The character model's methods are compared at rates of their own, and the noise scale is its two parts' ratio."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.reproduce import char_gpt
from benchmarks.reproduce.char_gpt import METHODS, TASK, main, measure
from benchmarks.runs import Config
from benchmarks.splits import shakespeare
from tests.benchmarks.reproduce.made_up import made_up, pretend


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    shakespeare.cache_clear()


def test_each_method_has_its_own_rate_and_a_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    low, _, high = TASK.learning_rates["adamw"]

    def make(config: Config) -> dict[str, Any]:
        best = high if config.method == "constant 128" else low
        return made_up(config, 1.0 if config.lr == best else 2.0)

    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()
    asked = pretend(monkeypatch, make)
    main(["--parts", "methods", "--seeds", "1"])
    tested = {config.method: config.lr for _, config in asked if config.split == "test"}
    assert tested == {method: high if method == "constant 128" else low for method in METHODS}
    assert f"| constant 128 | {high:g} | 0.0000 | 0 | 0 | 0.0 | 0.0 | not at hand |" in capsys.readouterr().out
    assert Path("results/char_gpt.png").read_bytes().startswith(b"\x89PNG")


def test_the_noise_scale_stands_beside_the_published_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    measured: list[str] = []

    def once(folder: str, iterations: tuple[int, ...]) -> dict[str, tuple[float, ...]]:
        measured.append(folder)
        return {str(iteration): (float(iteration), 1.0, float(iteration)) for iteration in iterations}

    monkeypatch.setattr(char_gpt, "measure", once)
    main(["--parts", "noise", "--data", "there"])
    main(["--parts", "noise", "--data", "there"])
    assert measured == ["there"]
    assert "240" in json.loads(Path("results/char_gpt_noise.json").read_text())["iterations"]
    out = capsys.readouterr().out
    assert "| 240 | 240 / 21.96 | 1 / 0.9331 | 240 / 20.49 |" in out
    assert "| 60 | 60 / not at hand |" in out


def test_the_check_measures_while_it_trains(tmp_path: Path) -> None:
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text("the quick brown fox jumps over a dog. " * 200)
    found = measure(str(tmp_path), (1, 3), width=8)
    assert list(found) == ["1", "3"]
    for scale, norm, trace in found.values():
        assert scale == pytest.approx(trace / norm)
        assert trace > 0
