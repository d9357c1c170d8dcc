"""A model that Fabric has set up trains as it does without, in Fabric's precision and into its loggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import adadagrad as ada
from adadagrad.core.errors import InvalidArgument, OverriddenSampler
from tests.integrations.fabrics import integration, make_engine, make_fabric
from tests.integrations.hosts import (
    SETTINGS,
    make_data,
    make_model,
    make_optimizer,
    mean_loss,
    plain,
    policy,
    sizes,
    train,
    weights,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trace_and_weights_are_the_plain_engines_bit_for_bit(dtype: torch.dtype) -> None:
    engine, model, _ = make_engine(make_fabric(), dtype)
    trace, expected = train(engine, model), plain(dtype)
    assert trace == expected[0]
    assert len(set(sizes(trace))) > 4
    assert torch.equal(weights(engine), expected[1])


def test_fabrics_double_precision_rounds_outputs_to_single() -> None:
    engine, model, _ = make_engine(make_fabric(precision="64-true"), torch.float64)
    trace, expected = train(engine, model), plain(torch.float64)
    assert sizes(trace) == sizes(expected[0])
    assert 0 < (weights(engine) - expected[1]).abs().max() < 1e-6


class Autocast(nn.Module):
    """What Fabric makes of a model in mixed bfloat16, written out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: torch.Tensor = self.inner(x.bfloat16())
        return y.float()


@pytest.mark.parametrize("every", [1, 3])
def test_mixed_bfloat16_is_fabrics_autocast_and_backward(every: int) -> None:
    options = {"measure": ada.Measure(every=every)}
    engine, model, _ = make_engine(make_fabric(precision="bf16-mixed"), **options)
    again = Autocast(make_model())
    alone = ada.AdaptiveBatch(again, make_optimizer(again), make_data(), policy(), **{**SETTINGS, **options})
    assert train(engine, model) == train(alone, again)
    assert torch.equal(weights(engine), weights(alone))
    assert not torch.equal(weights(engine), plain(**options)[1])


def test_bfloat16_weights_train() -> None:
    engine, model, _ = make_engine(make_fabric(precision="bf16-true"))
    trace = train(engine, model)
    assert weights(engine).dtype is torch.bfloat16
    assert trace[-1][1] < 0.8 * trace[0][1]


def mixed_float16(scale: float, interval: int = 2000) -> Any:
    """Return Fabric's 16-mixed on the CPU; on its own it has that on GPUs alone."""
    from lightning.fabric.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=interval)
    return make_fabric(plugins=[MixedPrecision("16-mixed", "cpu", scaler)]), scaler


def test_mixed_float16_does_not_depend_on_the_scale_which_fabric_and_the_engine_put_on_once() -> None:
    runs = []
    for scale in (1.0, 2.0**12):
        fabric, scaler = mixed_float16(scale, interval=5)
        engine, model, _ = make_engine(fabric)
        runs.append((train(engine, model), weights(engine)))
        assert scaler.get_scale() == scale * 2 ** (engine.steps // 5)
    assert sizes(runs[0][0]) == sizes(runs[1][0])
    assert torch.allclose(runs[0][1], runs[1][1], rtol=0, atol=1e-3)
    assert not torch.equal(runs[1][1], plain()[1])


def test_an_overflow_lowers_fabrics_scale_and_is_not_seen() -> None:
    fabric, scaler = mixed_float16(2.0**30)
    engine, model, _ = make_engine(fabric, total_samples=64, epochs=None)
    train(engine, model)
    assert engine.samples_seen == 64
    assert engine.skipped > 3
    assert scaler.get_scale() == 2.0 ** (30 - engine.skipped)


def test_by_hand_with_fabrics_backward() -> None:
    fabric = make_fabric(precision="bf16-mixed")
    engine, model, _ = make_engine(fabric)
    trace = []
    for step in engine:
        for inputs, targets in step:
            step.backward(F.cross_entropy(model(inputs), targets))
        decision = step.update()
        trace.append((decision.plan.global_batch_size, decision.observation.loss))
    twin, its_model, _ = make_engine(make_fabric(precision="bf16-mixed"))
    assert trace == train(twin, its_model)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("set_up", [False, True])
def test_a_loader_keeps_its_data_its_collation_and_its_shuffling(set_up: bool, shuffle: bool) -> None:
    def collated(rows: list[Any]) -> list[torch.Tensor]:
        return [2 * torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])]

    fabric = make_fabric()
    loader = DataLoader(make_data(), batch_size=7, shuffle=shuffle, collate_fn=collated)
    engine, model, _ = make_engine(fabric, data=fabric.setup_dataloaders(loader) if set_up else loader)
    again = make_model()
    alone = ada.AdaptiveBatch(again, make_optimizer(again), loader, policy(), **SETTINGS)
    assert train(engine, model) == train(alone, again)
    assert torch.equal(weights(engine), weights(alone))


def test_an_own_sampler_is_refused_as_it_is_without_fabric() -> None:
    fabric, data = make_fabric(), make_data()
    sampler = torch.utils.data.WeightedRandomSampler([1.0] * len(data), 8)
    with pytest.raises(OverriddenSampler, match=r"sampler of data \(WeightedRandomSampler\)"):
        make_engine(fabric, data=fabric.setup_dataloaders(DataLoader(data, sampler=sampler)))


@pytest.mark.parametrize(
    ("option", "value"),
    [("global_batch_size", 40), ("max_grad_norm", 0.01), ("seed", 3), ("policy", ada.ConstantBatch(32))],
)
def test_options_reach_the_engine(option: str, value: Any) -> None:
    options: dict[str, Any] = {option: value, **({"global_batch_size": None} if option == "policy" else {})}
    engine, model, _ = make_engine(make_fabric(), **options)
    own = make_model()
    settings = {**SETTINGS, **options}
    alone = ada.AdaptiveBatch(own, make_optimizer(own), make_data(), settings.pop("policy", policy()), **settings)
    trace = train(engine, model)
    assert trace == train(alone, own)
    assert trace != plain()[0]


def test_decisions_go_to_fabrics_loggers(tmp_path: Path) -> None:
    from lightning.fabric.loggers import CSVLogger

    fabric = make_fabric(loggers=CSVLogger(tmp_path, flush_logs_every_n_steps=1))
    engine, model, _ = make_engine(fabric)
    for step in engine:
        step.run(mean_loss(model))
        decision = step.update()
        integration.log_decision(fabric, decision, accuracy=0.5)
    (path,) = tmp_path.rglob("metrics.csv")
    header, *lines = [line.split(",") for line in path.read_text().splitlines()]
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    assert [int(row["step"]) for row in rows] == list(range(1, engine.steps + 1))
    assert float(rows[-1]["adadagrad/samples_seen"]) == 1800
    assert float(rows[-1]["adadagrad/loss"]) == pytest.approx(decision.observation.loss)
    assert {row["accuracy"] for row in rows} == {"0.5"}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("steps", [1, 4])
def test_fabrics_checkpoint_resumes_bit_for_bit(tmp_path: Path, precision: Any, steps: int) -> None:
    whole, model, _ = make_engine(make_fabric(precision=precision))
    expected = train(whole, model)
    fabric = make_fabric(precision=precision)
    first, model, optimizer = make_engine(fabric)
    begun = train(first, model, steps)
    fabric.save(tmp_path / "x", {"model": model, "optimizer": optimizer, "engine": integration.Progress(first)})
    fabric = make_fabric(precision=precision)
    second, model, optimizer = make_engine(fabric, model_seed=7)
    torch.manual_seed(99)
    integration.load(
        fabric, tmp_path / "x", {"model": model, "optimizer": optimizer, "engine": integration.Progress(second)}
    )
    assert second.steps == steps
    assert begun + train(second, model) == expected
    assert torch.equal(weights(second), weights(whole))
    saved = torch.load(tmp_path / "x", weights_only=True)
    assert not {"model", "optimizer"} & set(saved["engine"])


def test_the_optimizer_is_loaded_before_the_engine_or_missed(tmp_path: Path) -> None:
    def make(seed: int) -> Any:
        fabric, own = make_fabric(), make_model(seed=seed)
        model, optimizer = fabric.setup(own, torch.optim.AdamW(own.parameters(), lr=0.01))
        engine = integration.adaptive_batch(fabric, model, optimizer, make_data(), policy(), **SETTINGS)
        return fabric, engine, model, {"engine": integration.Progress(engine), "model": model, "optimizer": optimizer}

    fabric, first, model, state = make(0)
    train(first, model, 3)
    fabric.save(tmp_path / "x", state)
    expected = train(first, model)
    fabric, second, model, state = make(7)
    integration.load(fabric, tmp_path / "x", state)
    assert train(second, model) == expected
    fabric, _, _, state = make(7)
    del state["optimizer"]
    with pytest.raises(
        InvalidArgument, match=r"holds a state for 0 parameters, and held one for 4.*load the optimizer"
    ):
        integration.load(fabric, tmp_path / "x", state)
