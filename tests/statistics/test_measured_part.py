"""A failing measurement never harms the step: wherever it fails, training goes on with the gradient as it was."""

from __future__ import annotations

import warnings
from typing import Any, Never

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import adadagrad as ada
from adadagrad.core.errors import InvalidMeasurement
from adadagrad.core.settings import Measure
from adadagrad.statistics import MicroBatch, PerExample
from adadagrad.statistics.measured_part import MeasuredPart
from tests.statistics.checking import EVERYTHING, Composite, floats, losses_of

X = floats(12, 4)
UNITS, PART = "adadagrad.statistics.unit_step", "adadagrad.statistics.measured_part"
PLACES = {
    "MicroBatch, taking in": (MicroBatch(), f"{UNITS}.squared_norm"),
    "MicroBatch, keeping for coordinates": (MicroBatch(), f"{UNITS}._Unit"),
    "MicroBatch, end of the part": (MicroBatch(), f"{PART}.squared_norm"),
    "PerExample, taking in": (PerExample(), "adadagrad.statistics.example_instrument.Examples"),
    "PerExample, end of the part": (PerExample(), f"{PART}.squared_norm"),
}


def out_of_memory(*args: Any, **kwargs: Any) -> Never:
    raise torch.OutOfMemoryError("no memory left")


def network() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def step(model: nn.Module, instrument: Any) -> list[Tensor]:
    """Run two measured micro-batches and one that is not; return the gradient."""
    model.zero_grad()
    for part in X[:8].split(4):
        with instrument.micro_batch(4, 1 / 12):
            (losses_of(model, (part,)).sum() / 12).backward()
    instrument.close_group()
    (losses_of(model, (X[8:],)).sum() / 12).backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("place", PLACES)
def test_the_gradient_is_whole_and_the_next_step_is_measured(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    estimator, target = PLACES[place]
    model = network()
    instrument = estimator.open(model, EVERYTHING)
    whole = step(model, instrument)
    expected = instrument.finish(12)
    with monkeypatch.context() as patch:
        patch.setattr(target, out_of_memory)
        assert all(torch.equal(a, b) for a, b in zip(step(model, instrument), whole, strict=True))
    with pytest.raises(InvalidMeasurement, match=r"the measurement failed \(OutOfMemoryError: no memory left\)"):
        instrument.finish(12)
    step(model, instrument)
    assert instrument.finish(12) == expected


@pytest.mark.parametrize("place", PLACES)
def test_a_run_goes_on_as_if_that_step_had_not_been_measured(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    estimator, target = PLACES[place]
    weights = []
    for fails in (False, True):
        model = network()
        engine = ada.AdaptiveBatch(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            TensorDataset(floats(32, 4), floats(32, 2)),
            ada.ConstantBatch(8),
            micro_batch_size=4,
            total_samples=24,
            measure=Measure(every=1, max_examples=4, estimator=estimator),
        )
        for number, one in enumerate(engine):
            with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                if fails and number == 1:
                    patch.setattr(target, out_of_memory)
                one.run(lambda batch, model=model: (model(batch[0]) - batch[1]).square().mean())
                decision = one.update()
            ends = place.endswith("part") and isinstance(estimator, MicroBatch)  # its units are the whole step
            failed = fails and number == 1 and not ends
            assert (decision.observation.gradient is None) == failed
            assert any("the step is not affected" in str(w.message) for w in said) == failed
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_an_earlier_gradient_that_cannot_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback compares with what was there before a micro-batch, and copies it before the forward."""
    torch.manual_seed(3)
    model = Composite(lambda self, x: self.a(x) * self.gain, a=nn.Linear(4, 2), gain=nn.Parameter(torch.rand(2)))
    model.double()
    instrument = PerExample().open(model, EVERYTHING)
    with pytest.warns(UserWarning, match="gain"):
        whole = step(model, instrument)
    instrument.finish(12)
    clone = Tensor.clone
    for fails in (False, True):
        model.zero_grad()
        for number, part in enumerate(X.split(4)):
            gradient = model.gain.grad

            def copy(self: Tensor, *args: Any, gradient: Any = gradient, **kwargs: Any) -> Tensor:
                return out_of_memory() if self is gradient else clone(self, *args, **kwargs)

            with monkeypatch.context() as patch:
                if fails and number:
                    patch.setattr(Tensor, "clone", copy)
                with instrument.micro_batch(4, 1 / 12):
                    (losses_of(model, (part,)).sum() / 12).backward()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), whole, strict=True))
        if fails:
            with pytest.raises(InvalidMeasurement, match="no memory left"):
                instrument.finish(12)
        else:
            instrument.finish(12)


def test_the_first_failure_is_told() -> None:
    part = MeasuredPart()
    for message in ("one", "two"):
        with part.protect():
            raise InvalidMeasurement(message)
    with part.protect():
        raise ValueError("three")
    assert str(part.failure) == "one"
    part = MeasuredPart()
    with part.protect():
        raise ValueError("three")
    assert isinstance(part.failure, InvalidMeasurement)
    assert isinstance(part.failure.__cause__, ValueError)
    with pytest.raises(KeyboardInterrupt), part.protect():
        raise KeyboardInterrupt


def test_a_part_without_coordinates_keeps_its_norm_alone() -> None:
    p = nn.Parameter(torch.zeros(2))
    gradient = torch.tensor([3.0, 4.0])
    for copy in (False, True):
        part = MeasuredPart()
        part.close({p: gradient}, copy=copy)
        assert part.norm_sq == 25.0
        assert [g.tolist() for g in part.gradients.values()] == ([[3.0, 4.0]] if copy else [])
        assert all(g is not gradient for g in part.gradients.values())
