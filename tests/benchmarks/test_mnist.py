"""The MNIST benchmark trains what its table says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import mnist
from tests.cli.mnist_folder import write_mnist


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The benchmark sets torch's number of threads; what comes after it is not to notice."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_seeds_trained_are_the_seeds_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = []

    def train(folder: str, model: str, row: mnist.Row, samples: int, seed: int) -> dict[str, float]:
        trained.append((row.name, seed))
        names = ("steps", "mean_batch", "last_batch", "samples", "seconds", "measuring", "accuracy")
        return dict.fromkeys(names, float(seed))

    def pool(workers: int, **_: Any) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mnist, "train", train)
    monkeypatch.setattr(mnist, "ProcessPoolExecutor", pool)
    write_mnist(tmp_path / "mnist", train=20, test=10)
    options = ["--data", "mnist", "--samples", "40", "--rows", "constant 64", "--seeds", "2", "--first-seed", "5"]
    mnist.main(options)
    assert trained == [("constant 64", 5), ("constant 64", 6)]
    out = capsys.readouterr().out
    assert "seeds 5 to 6" in out
    assert "5.5000 ± 0.7071" in out
    written = json.loads(Path("results/mnist-logistic-40-seeds-5-6-constant-64.json").read_text())
    assert written["seeds"] == [5, 6]
    assert written["rows"]["constant 64"]["accuracy"] == [5.0, 6.0]
    with pytest.raises(SystemExit):
        mnist.main(["--data", "mnist", "--seeds", "0"])


@pytest.mark.parametrize("row", mnist.ROWS, ids=lambda row: row.name)
def test_every_row_trains(tmp_path: Path, row: mnist.Row) -> None:
    write_mnist(tmp_path, train=1100, test=20)
    result = mnist.train(str(tmp_path), "logistic", row, 1200, 1)
    assert result["samples"] == 1200
    assert result["mean_batch"] == 1200 / result["steps"]
    assert 0 <= result["accuracy"] <= 1
