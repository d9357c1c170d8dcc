"""A loss scale changes nothing but what would have vanished: statistics, weights, counters, and what an overflow is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import adadagrad as ada
from adadagrad.core.errors import InvalidArgument, NonFiniteGradient
from adadagrad.engine.gradients import Gradients
from tests.engine.cases import make_data, make_engine, make_model, mean_loss, read_log, train, weights
from tests.engine.test_nonfinite import Poisoned
from tests.ranks import on_ranks

ALL = {"every": 1, "max_examples": None}
WAYS: dict[str, dict[str, Any]] = {
    "per example": {"measure": ada.Measure(estimator=ada.PerExample(), **ALL)},
    "a part": {"measure": ada.Measure(estimator=ada.PerExample(), every=1, max_examples=5)},
    "probe": {"measure": ada.Measure(estimator=ada.Probe(), **ALL)},
    "micro-batches": {"measure": ada.Measure(estimator=ada.MicroBatch(), **ALL)},
    "inner products": {"policy": ada.InnerProductTest(theta=0.8), "measure": ada.Measure(**ALL)},
    "of micro-batches": {
        "policy": ada.AugmentedInnerProductTest(theta=0.8, nu=4.0),
        "measure": ada.Measure(estimator=ada.MicroBatch(), **ALL),
    },
    "coordinates": {"policy": ada.CoordinateNormTest(eta=2.0), "measure": ada.Measure(**ALL)},
    "clipped": {"max_grad_norm": 0.1},
    "adascale": {"rate": ada.AdaScale()},
}


def scaler(scale: float = 2.0**16, interval: int = 2000, **options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=interval, **options)


def run(model: nn.Module, weighted: bool = False, **options: Any) -> Any:
    own = model.module if isinstance(model, DistributedDataParallel) else model
    optimizer = torch.optim.SGD(own.parameters(), lr=0.05, momentum=0.9)
    engine = make_engine(model, optimizer, global_batch_size=12, micro_batch_size=5, total_samples=200, **options)

    def loss(batch: Any) -> Any:
        if not weighted:
            return mean_loss(model)(batch)
        return (F.cross_entropy(model(batch[0]), batch[1], reduction="none") * batch[3]).sum(), batch[3]

    return engine, [(d.plan.global_batch_size, d.observation.loss, d.observation.gradient) for d in train(engine, loss)]


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("way", list(WAYS))
def test_a_power_of_two_changes_no_bit(way: str, weighted: bool) -> None:
    plain, expected = run(make_model(), weighted, **WAYS[way])
    scaled, found = run(make_model(), weighted, grad_scaler=scaler(), **WAYS[way])
    assert [size for size, _, _ in found] == [size for size, _, _ in expected]
    assert torch.equal(weights(plain.model), weights(scaled.model))
    measured = [(a, b) for (_, _, a), (_, _, b) in zip(found, expected, strict=True) if b is not None]
    assert measured
    for a, b in measured:
        for name in ("grad_norm_sq", "variance_trace", "inner_product_variance", "coordinate_ratio"):
            one, other = getattr(a, name), getattr(b, name)
            assert (one is None) == (other is None)
            assert one is None or one == pytest.approx(other, rel=1e-12)


def test_half_precision_measures_what_single_precision_measures() -> None:
    """Small losses, whose gradients vanish in float16 without a scale."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 3))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    found = {}
    for name, options in {
        "single": {},
        "half": {"grad_scaler": scaler()},
        "unscaled": {},
    }.items():
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        measure = ada.Measure(estimator=ada.PerExample(), **ALL)
        engine = make_engine(
            model, optimizer, make_data(dtype=torch.float32), global_batch_size=64, measure=measure, **options
        )

        def loss(batch: Any, name: str = name) -> Any:
            with torch.autocast("cpu", dtype=torch.float16, enabled=name != "single"):
                output = model(batch[0])
            return F.cross_entropy(output.float(), batch[1]) * 1e-5

        found[name] = train(engine, loss, steps=1)[0].observation.gradient
        assert engine.skipped == 0
    for number in ("grad_norm_sq", "variance_trace"):
        whole = getattr(found["single"], number)
        assert getattr(found["half"], number) == pytest.approx(whole, rel=0.01)
        assert abs(getattr(found["unscaled"], number) / whole - 1) > 0.01


def overflowing(engine: Any, steps: set[int]) -> Any:
    def loss(batch: Any) -> Any:
        output = engine.model(batch[0])
        return F.cross_entropy(Poisoned.apply(output, math.inf) if engine.steps + 1 in steps else output, batch[1])

    return loss


def test_an_overflow_is_drawn_and_not_seen(tmp_path: Path) -> None:
    model = make_model()
    own = scaler(1024.0, interval=3)
    options = {"grad_scaler": own, "on_nonfinite": "stop", "log_dir": tmp_path, "total_samples": 120}
    engine = make_engine(model, policy=ada.ConstantBatch(12), **options)
    decisions = train(engine, overflowing(engine, {2, 6}))
    assert [d.samples_seen for d in decisions][:7] == [12, 12, 24, 36, 48, 48, 60]
    assert (engine.samples_seen, engine.samples_drawn, engine.skipped) == (120, 144, 2)
    assert [d.reason for d in decisions].count("skipped: overflow of the loss scale") == 2
    assert len(engine.optimizer.gradients) == 10
    lines = [line for line in read_log(tmp_path) if line["kind"] in ("step", "skip")]
    assert [line["kind"] for line in lines][:3] == ["step", "skip", "step"]
    # after steps 1, 2 (overflow), 3, 4, 5 (the third that was not), 6 (overflow), 7, 8, 9, ...
    scales = [1024, 512, 512, 512, 1024, 512, 512, 512, 1024, 1024, 1024, 2048]
    assert [line["loss_scale"] for line in lines] == scales
    assert own.get_scale() == 2048


def test_a_run_that_is_never_finite_ends() -> None:
    for options in ({"on_nonfinite": "stop"}, {}):
        engine = make_engine(make_model(), policy=ada.ConstantBatch(12), grad_scaler=scaler(8.0), **options)
        with pytest.raises(NonFiniteGradient):
            train(engine, overflowing(engine, set(range(1, 999))))
        assert engine.skipped == (4 if options else 53)  # at the scales 8, 4 and 2 it may be the scale's fault


def test_a_loss_that_is_not_finite_is_no_overflow() -> None:
    engine = make_engine(make_model(), policy=ada.ConstantBatch(12), grad_scaler=scaler(), on_nonfinite="stop")
    with pytest.raises(NonFiniteGradient):
        train(engine, lambda batch: mean_loss(engine.model)(batch) * math.nan)


def test_what_is_no_overflow_leaves_the_scale_alone() -> None:
    """Else losses that are not finite now and then lower it until gradients vanish."""
    own = scaler(1024.0)
    engine = make_engine(make_model(), policy=ada.ConstantBatch(12), grad_scaler=own)
    train(engine, lambda batch: mean_loss(engine.model)(batch) * (math.nan if engine.steps in (1, 2) else 1.0), steps=4)
    assert engine.skipped == 2
    assert own.get_scale() == 1024.0


def test_resuming_beside_an_overflow_bit_for_bit(tmp_path: Path) -> None:
    def build() -> Any:
        model, own = make_model(0.3), scaler(1024.0, interval=2)
        return make_engine(model, torch.optim.Adam(model.parameters()), grad_scaler=own)

    whole = build()
    for step in whole:
        step.run(overflowing(whole, {3, 5}))
        step.update()
        whole.save(tmp_path / f"{whole.steps}.pt")
    for k in (2, 3, 4, 5):
        again = build()
        again.load(tmp_path / f"{k}.pt")
        train(again, overflowing(again, {3, 5}))
        assert torch.equal(weights(again.model), weights(whole.model))
        assert again.scaling.state_dict() == whole.scaling.state_dict()
        assert (again.steps, again.skipped) == (whole.steps, whole.skipped)


def test_a_run_without_a_scaler_goes_on_with_one_and_back(tmp_path: Path) -> None:
    first = make_engine(make_model(), policy=ada.ConstantBatch(12))
    train(first, steps=2)
    first.save(tmp_path / "plain.pt")
    second = make_engine(make_model(), policy=ada.ConstantBatch(12), grad_scaler=scaler(64.0))
    second.load(tmp_path / "plain.pt")
    assert second.scaling.factor == 64.0
    second.save(tmp_path / "scaled.pt")
    first.load(tmp_path / "scaled.pt")
    assert first.scaling.factor == 1.0


def test_one_that_is_not_enabled_does_nothing() -> None:
    off = torch.amp.GradScaler("cpu", enabled=False)
    plain, scaled = (run(make_model(), **options)[0] for options in ({}, {"grad_scaler": off}))
    assert torch.equal(weights(plain.model), weights(scaled.model))
    assert scaled.scaling.log_fields() == {}


def over_ranks(rank: int) -> Any:
    """Rank 1's gradient alone overflows in step 3; the worker estimator and per-example norms see no scale."""
    found = {}
    for name, estimator in {"worker": ada.Worker(), "per example": ada.PerExample()}.items():
        records = []
        for options in ({}, {"grad_scaler": scaler(1024.0)}):
            model = make_model()
            wrapped = DistributedDataParallel(model)
            engine, trace = run(wrapped, measure=ada.Measure(estimator=estimator, **ALL), **options)
            records.append([(size, g.variance_trace, g.grad_norm_sq) for size, _, g in trace if g is not None])
        plain, scaled = records
        found[name] = max(
            abs(a / b - 1) for one, other in zip(plain, scaled, strict=True) for a, b in zip(one, other, strict=True)
        )
    model = make_model()
    engine = make_engine(
        DistributedDataParallel(model),
        torch.optim.SGD(model.parameters(), lr=0.1),
        policy=ada.ConstantBatch(12),
        grad_scaler=scaler(1024.0),
        total_samples=60,
    )
    train(engine, overflowing(engine, {3} if rank == 1 else set()))
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InvalidArgument, match="bfloat16"):
        make_engine(model, optimizer, parallel=ada.LocalSGD(model, optimizer), grad_scaler=scaler())
    return found, (engine.skipped, engine.samples_drawn, engine.scaling.factor), weights(engine.parallel.module)


def test_ranks_see_one_overflow() -> None:
    (found, counts, w), (_, others, other) = on_ranks(2, over_ranks)
    assert max(found.values()) < 1e-12
    assert counts == others == (1, 72, 512.0)
    assert torch.equal(w, other)


@pytest.mark.parametrize("wrong", [1024.0, torch.amp.GradScaler, "cuda"])
def test_something_else(wrong: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"must be a torch\.amp\.GradScaler"):
        make_engine(make_model(), grad_scaler=wrong)


def test_half_precision_gradients_are_scaled_by_the_exact_factor():
    """torch's foreach multiplication on a CPU rounds 0.999 to 1 in bfloat16 first."""
    model = make_model(dtype=torch.float32).to(torch.bfloat16)
    gradients = Gradients(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)
    gradients.scale(0.998)
    assert all(bool((p.grad == (torch.tensor(100.0) * 0.998).bfloat16()).all()) for p in model.parameters())
    gradients.scale(0.5)
    assert all(bool((p.grad == 50).all()) for p in model.parameters())
