"""CABS and the constant batches train alike but for the batch."""

from __future__ import annotations

import pytest

from benchmarks.reproduce.cabs import METHODS, main
from tests.benchmarks.reproduce.made_up import pretend


def test_all_rows_share_rate_optimizer_and_budget(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = pretend(monkeypatch)
    main(["--seeds", "2"])
    assert {(out, config.optimizer, config.lr, config.split) for out, config in asked} == {
        ("cabs", "plain-sgd", 0.1, "test")
    }
    assert {(config.task.name, config.task.budget) for _, config in asked} == {
        *(("cnn", 110_000), ("mlp", 550_000), ("logistic", 550_000))
    }
    assert [config.method for _, config in asked[:5]] == list(METHODS)
    assert [config.task.name for _, config in asked] == ["cnn"] * 10 + ["mlp"] * 10 + ["logistic"] * 10
    assert asked[10][1].task.build(0)[1].out_features == 64  # type: ignore[index]
    out = capsys.readouterr().out
    assert out.count("| CABS, 16 to 2048 | 0 ± 1 | 0 ± 1 | 0.5000 ± 0.7071 |") == 3
