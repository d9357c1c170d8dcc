"""The study of perturbations in a reduced form: it runs to its tables, and its rows cost what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.neighbours import perturbation
from benchmarks.neighbours.perturbed_networks import SETTINGS, Setting, networks, small_cnn
from tests.cli.mnist_folder import write_mnist

SMALL = replace(SETTINGS["digits"], crafting=(20, 40), train=200, epochs=6, search=3)


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    pytest.importorskip("sklearn")
    return perturbation.study("digits", 2, SMALL)


def test_rows_at_equal_cost_have_as_many_gradients_as_sga(records: list[dict[str, Any]]) -> None:
    for n in (20, 40):
        counts = {r["row"]: r["gradient_count"] for r in records if r["n"] == n}
        assert list(counts) == list(perturbation.ROWS)
        assert counts["random signs"] == 0
        assert counts["SPGD, batch 10"] == counts["SPGD, batch 100"] == 3 * n
        for row in ("SPGD, batch 10, 4x", "SPGD, batch 100, 4x", "aggregation without the walk", "SGA"):
            assert counts[row] == 4 * 3 * n


def test_tables_hold_paired_differences_over_seeds(records: list[dict[str, Any]]) -> None:
    lines = perturbation.rows_of(records, 40)
    assert [line[0] for line in lines] == list(perturbation.ROWS)
    assert {len(line) for line in lines} == {6}
    assert lines[-1][3] == ""
    ratio = {(r["row"], r["seed"]): 100 * r["fooling_ratio"] for r in records if r["n"] == 40 and r["model"] == "cnn"}
    both = [ratio["SGA", seed] - ratio["random signs", seed] for seed in range(2)]
    assert lines[0][3].startswith(f"{sum(both) / 2:.1f} ± ")
    assert lines[0][3].endswith(f"{sum(d > 0 for d in both)} of 2")
    after = perturbation.before_and_after(records, 40)
    assert [len(line) for line in after] == [5, 5]
    assert after[0][1].split()[0] != after[1][1].split()[0]


def test_networks_begin_alike_and_training_is_repeated_by_the_seed() -> None:
    data = SMALL.shown(torch.utils.data.TensorDataset(torch.rand(64, 1, 8, 8), torch.arange(64) % 10))
    made, again = (networks(data, replace(SMALL, epochs=1), 3) for _ in range(2))
    for name in ("cnn", "mlp", "robust"):
        pairs = zip(made[name].parameters(), again[name].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert not made[name].training
    untrained = networks(data, replace(SMALL, epochs=0), 3)
    pairs = zip(untrained["cnn"].parameters(), untrained["robust"].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert small_cnn((1, 28, 28))(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_on_a_grey_ground_nothing_is_cut_off() -> None:
    setting: Setting = replace(SMALL, contrast=0.6)
    images = setting.shown(torch.utils.data.TensorDataset(torch.tensor([0.0, 0.5, 1.0]), torch.arange(3))).tensors[0]
    torch.testing.assert_close(images, torch.tensor([0.2, 0.5, 0.8]))
    assert setting.eps == pytest.approx(0.09)
    assert float(images.min()) - setting.eps > 0


def test_the_command_prints_both_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_mnist(tmp_path / "mnist", train=30, test=10)
    monkeypatch.setitem(perturbation.SETTINGS, "mnist", Setting(crafting=(20,), train=30, epochs=1, batch=10, search=1))
    monkeypatch.setattr("sys.argv", ["perturbation", "--data", f"mnist:{folder}", "--seeds", "1", "--grey"])
    perturbation.main()
    out = capsys.readouterr().out
    assert "mnist-grey, eps 0.09, 20 crafting images, 1 seeds" in out
    assert out.count("\n| --- |") == 2
    assert (tmp_path / "results" / "neighbours" / "perturbation-mnist-grey.json").is_file()
    monkeypatch.setattr("sys.argv", ["perturbation", "--data", "letters"])
    with pytest.raises(SystemExit):
        perturbation.main()
