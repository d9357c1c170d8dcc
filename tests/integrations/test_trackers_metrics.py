"""In a loop of one's own a tracker gets the numbers that the log has."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import adadagrad as ada
from adadagrad.integrations.trackers import follow, metrics_of, track
from tests.integrations.trackers import Memory


def train(folder: Path, tracker: Memory, *, with_policy: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    data = TensorDataset(torch.randn(200, 4), torch.randint(3, (200,)))
    engine = ada.AdaptiveBatch(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        data,
        policy=ada.NormTest(eta=1.0),
        global_batch_size=8,
        measure=ada.Measure(every=2),
        epochs=2,
        log_dir=folder,
    )
    for step in engine:
        step.run(lambda batch: F.cross_entropy(model(batch[0]), batch[1]))
        track(step.update(), tracker, *([engine.policy] if with_policy else []))


def test_the_loop_and_the_log_say_the_same(tmp_path: Path) -> None:
    ours, logged = Memory(), Memory()
    train(tmp_path, ours, with_policy=True)
    follow(tmp_path, logged)
    clocks = {"adadagrad/seconds", "adadagrad/measure_seconds", "adadagrad/samples_drawn"}
    without = [(step, seen, {n: v for n, v in m.items() if n not in clocks}) for step, seen, m in logged.calls]
    assert ours.calls == without
    measured = [numbers for _, _, numbers in ours.calls if "adadagrad/variance_trace" in numbers]
    assert 0 < len(measured) < len(ours.calls)
    for numbers in measured:
        assert numbers["adadagrad/threshold"] == 1.0
        ratio = numbers["adadagrad/relative_variance"] / numbers["adadagrad/threshold"]
        assert abs(ratio - numbers["adadagrad/requested"] / numbers["adadagrad/global_batch_size"]) < 1e-9
        assert {"adadagrad/grad_norm_sq", "adadagrad/noise_scale"} <= set(numbers)


def test_without_the_policy_there_is_no_threshold(tmp_path: Path) -> None:
    memory = Memory()
    train(tmp_path, memory, with_policy=False)
    names = set().union(*(numbers for _, _, numbers in memory.calls))
    assert "adadagrad/threshold" not in names
    assert {"adadagrad/relative_variance", "adadagrad/loss", "adadagrad/lr"} <= names


def test_a_decision_alone() -> None:
    plan = ada.BatchPlan(global_batch_size=64, micro_batch_size=32, accumulation_steps=2)
    seen = ada.Observation(global_batch_size=64, samples_seen=640, loss=0.5)
    decision = ada.Decision(
        step=10, samples_seen=640, progress=640, observation=seen, requested=90.5, plan=plan, next_plan=plan,
        lr=0.1, reason="hold",
    )  # fmt: skip
    assert metrics_of(decision) == {
        "adadagrad/global_batch_size": 64.0,
        "adadagrad/micro_batch_size": 32.0,
        "adadagrad/accumulation_steps": 2.0,
        "adadagrad/loss": 0.5,
        "adadagrad/lr": 0.1,
        "adadagrad/requested": 90.5,
        "adadagrad/next_global_batch_size": 64.0,
    }
