"""A model that Accelerate has prepared trains as it does without, in its precision and into its trackers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import adadagrad as ada
from tests.integrations.accelerators import accelerate, make_accelerator, make_engine
from tests.integrations.hosts import (
    SETTINGS,
    make_data,
    make_model,
    make_optimizer,
    plain,
    policy,
    sizes,
    train,
    weights,
)

log_decision = pytest.importorskip("adadagrad.integrations.accelerate").log_decision


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trace_and_weights_are_the_plain_engines_bit_for_bit(dtype: torch.dtype) -> None:
    engine = make_engine(make_accelerator(), dtype)
    trace, expected = train(engine, engine.model), plain(dtype)
    assert trace == expected[0]
    assert len(set(sizes(trace))) > 4
    assert torch.equal(weights(engine), expected[1])


@pytest.mark.parametrize("seedable", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_prepared_loader_keeps_its_data_its_collation_and_its_shuffling(seedable: bool, shuffle: bool) -> None:
    def collated(rows: list[Any]) -> list[torch.Tensor]:
        return [2 * torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])]

    config = accelerate.utils.DataLoaderConfiguration(use_seedable_sampler=seedable)
    accelerator = make_accelerator(dataloader_config=config)
    loader, its_twin = (DataLoader(make_data(), batch_size=7, shuffle=shuffle, collate_fn=collated) for _ in range(2))
    own = make_model()
    model, optimizer, prepared = accelerator.prepare(own, make_optimizer(own), loader)
    assert type(prepared) is not DataLoader
    engine = ada.AdaptiveBatch(model, optimizer, prepared, policy(), accelerator=accelerator, **SETTINGS)
    again = make_model()
    alone = ada.AdaptiveBatch(again, make_optimizer(again), its_twin, policy(), **SETTINGS)
    assert train(engine, model) == train(alone, again)
    assert torch.equal(weights(engine), weights(alone))


class Autocast(nn.Module):
    """What Accelerate makes of a model in bfloat16, written out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: torch.Tensor = self.inner(x)
        return y.float()


@pytest.mark.parametrize("every", [1, 3])
def test_bfloat16_is_accelerates_autocast_in_measured_steps_and_in_others(every: int) -> None:
    options = {"measure": ada.Measure(every=every)}
    engine = make_engine(make_accelerator(mixed_precision="bf16"), **options)
    again = Autocast(make_model())
    alone = ada.AdaptiveBatch(again, make_optimizer(again), make_data(), policy(), **{**SETTINGS, **options})
    assert train(engine, engine.model) == train(alone, again)
    assert torch.equal(weights(engine), weights(alone))
    assert not torch.equal(weights(engine), plain(**options)[1])


def test_one_layer_alone_in_bfloat16_is_measured_by_micro_batches() -> None:
    accelerator = make_accelerator(mixed_precision="bf16")
    torch.manual_seed(0)
    own = nn.Linear(10, 3)  # whose own forward casts, which no rule for linear layers counts
    model, optimizer = accelerator.prepare(own, make_optimizer(own))
    engine = ada.AdaptiveBatch(model, optimizer, make_data(), policy(), accelerator=accelerator, **SETTINGS)
    with pytest.warns(UserWarning, match=r"measuring with MicroBatch\(\) from now on"):
        trace = train(engine, model)
    assert engine.samples_seen == 1800
    assert len(set(sizes(trace))) > 3


def test_the_accelerators_scaler_is_the_engines() -> None:
    accelerator = make_accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)  # as fp16 has on a GPU
    engine = make_engine(accelerator)
    assert engine.scaling.factor == 2.0**10
    trace, expected = train(engine, engine.model), plain()
    assert trace == expected[0]
    assert torch.equal(weights(engine), expected[1])  # a power of two changes no bit
    assert accelerator.scaler.get_scale() == 2.0 ** (10 + len(trace) // 5)


def test_an_overflow_lowers_the_accelerators_scale_and_is_not_seen() -> None:
    accelerator = make_accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    engine = make_engine(accelerator, total_samples=64, epochs=None)
    for step in engine:
        step.run(lambda batch: 100 * nn.functional.cross_entropy(engine.model(batch[0]), batch[1]))
        step.update()
    assert engine.samples_seen == 64
    assert engine.skipped > 0
    assert accelerator.scaler.get_scale() == 2.0 ** (127 - engine.skipped)


class Kept(accelerate.tracking.GeneralTracker):
    """A tracker that remembers."""

    name = "kept"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def tracker(self) -> Any:
        return self.lines

    def store_init_configuration(self, values: dict[str, Any]) -> None: ...

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.lines.append((step, values))


def test_decisions_go_to_the_accelerators_trackers() -> None:
    kept = Kept()
    accelerator = make_accelerator(log_with=[kept])
    accelerator.init_trackers("run")
    engine = make_engine(accelerator)
    for step in engine:
        step.run(lambda batch: nn.functional.cross_entropy(engine.model(batch[0]), batch[1]))
        decision = step.update()
        log_decision(accelerator, decision, accuracy=0.5)
    assert [number for number, _ in kept.lines] == list(range(1, engine.steps + 1))
    last, first = kept.lines[-1][1], kept.lines[0][1]
    assert last["adadagrad/samples_seen"] == engine.samples_seen == 1800
    assert last["adadagrad/loss"] == decision.observation.loss
    assert first["adadagrad/global_batch_size"] == 16
    assert first["adadagrad/next_global_batch_size"] == kept.lines[1][1]["adadagrad/global_batch_size"]
    assert first["adadagrad/noise_scale"] > 0
    assert last["accuracy"] == 0.5
    assert all(isinstance(value, int | float) for _, values in kept.lines for value in values.values())
