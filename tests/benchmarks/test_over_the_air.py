"""The benchmark's rounds are those of the library, and its table has every method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from adadagrad.federated import Channel, Server, simulate
from adadagrad.optimizers import OverTheAirAdam

pytest.importorskip("sklearn")
from benchmarks.neighbours import over_the_air


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def test_one_weighted_gradient_is_what_the_channel_makes_of_the_clients() -> None:
    x, y, held_out = over_the_air.load("digits")
    x, held_out = x.double(), (held_out[0].double(), held_out[1])
    problem = over_the_air.Problem(x, y, held_out, 3, "test")
    channel = Channel(alpha=1.3, scale=0.1, seed=3)
    fast, slow = nn.Linear(64, 10).double(), nn.Linear(64, 10).double()
    slow.load_state_dict(fast.state_dict())
    optimizer = OverTheAirAdam(fast.parameters(), 0.01)
    for number in range(1, 6):
        for name, grad in problem.heard(fast, channel, number).items():
            fast.get_parameter(name).grad = grad
        optimizer.step()
    server = Server(slow, OverTheAirAdam(slow.parameters(), 0.01), channel)
    clients = [Subset(TensorDataset(x, y), part.tolist()) for part in problem.clients]
    simulate(server, clients, mean_loss, rounds=5)
    torch.testing.assert_close(fast.weight, slow.weight, rtol=1e-9, atol=1e-11)


def test_the_halves_of_what_is_held_out_do_not_meet() -> None:
    data = over_the_air.load("digits")
    val, test = (over_the_air.Problem(*data, 0, part) for part in ("val", "test"))
    assert len(val.test[1]) + len(test.test[1]) == len(data[2][1])
    assert torch.equal(torch.cat([val.test[0], test.test[0]]), data[2][0])


def test_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(over_the_air, "RATES", [0.003, 0.01, 0.03])
    monkeypatch.setattr(over_the_air, "TUNING", (100,))
    chosen = {name: over_the_air.METHODS[name] for name in ("FedAvg", "Adam-OTA, power estimated", "FedAvg, clipped")}
    monkeypatch.setattr(over_the_air, "METHODS", chosen)
    arguments = ["--seeds", "2", "--rounds", "4", "--tails", "1.5"]
    monkeypatch.setattr("sys.argv", ["over_the_air", *arguments])
    over_the_air.main()
    printed = capsys.readouterr().out
    for name in chosen:
        assert f"| {name} | " in printed
    kept = json.loads((tmp_path / "results" / "over-the-air.json").read_text())
    assert len(kept["runs"]["FedAvg, tail 1.5"]["accuracy"]) == 2
