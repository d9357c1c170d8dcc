"""The one walk before a measured forward: what torch's own walks say, and nothing missed that changed between steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from adadagrad.core.errors import BatchCoupledModule, InvalidMeasurement
from adadagrad.statistics import PerExample
from adadagrad.statistics.broadcast import RAW
from adadagrad.statistics.survey import Survey
from tests.statistics.checking import EVERYTHING, NORMS, Composite, assert_exact, floats, losses_of

X = floats(6, 4)


class Gain(nn.Module):
    """A parameter of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.5, 2.0, 1.5, 1.0]))

    def forward(self, x):
        return x * self.gain


def network() -> nn.Sequential:
    torch.manual_seed(8)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).eval(), nn.Tanh(), nn.Linear(4, 4)).double()


def tied() -> nn.Module:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    a.bias.requires_grad_(False)
    parts = {"a": a, "b": b, "again": a, "inner": nn.Sequential(b, nn.Identity()), "gain": Gain()}
    return Composite(lambda self, x: self.gain(self.inner(self.a(x))), **parts).double()


@pytest.mark.parametrize(
    "build", [network, tied, lambda: nn.Linear(4, 4), nn.Identity], ids=["network", "tied", "one layer", "nothing"]
)
def test_it_names_and_orders_parameters_as_torch_does(build: Callable[[], nn.Module]) -> None:
    model = build()
    survey = Survey.of(model)
    expected = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name, _ in expected] == list(survey.parameters)
    assert all(p is survey.parameters[name] for name, p in expected)


def test_layers_and_parameters_of_no_layer() -> None:
    model = tied()
    survey = Survey.of(model)
    assert [name for name, _, _ in survey.layers] == ["a", "b"]
    assert list(survey.raw.values()) == [("gain.gain", RAW)]
    assert survey.replaced == []
    model.a.forward = model.a.forward
    survey = Survey.of(model)
    assert survey.replaced == [("a", model.a)]
    assert [name for name, _, _ in survey.layers] == ["b"]
    assert list(survey.raw.values()) == [("gain.gain", RAW)], "the tied weight is still b's"


def test_layers_that_are_seen_whole_are_those_without_another_rule_that_train_something() -> None:
    model = tied()
    assert [(name, module) for name, module, _ in Survey.of(model).whole] == [("gain", model.gain)]
    assert Survey.of(model.gain).whole == [], "the model itself is no layer"
    model.gain.requires_grad_(False)
    assert Survey.of(model).whole == []


def replace(model: nn.Sequential) -> None:
    model[0] = nn.Linear(4, 4).double()


def add(model: nn.Sequential) -> None:
    model.append(nn.Linear(4, 3).double())


def add_raw(model: nn.Sequential) -> None:
    model.append(Gain().double())


def swap_parameter(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(floats(4, 4))


def freeze(model: nn.Sequential) -> None:
    model[0].weight.requires_grad_(False)


def freeze_layer(model: nn.Sequential) -> None:
    model[3].requires_grad_(False)


def unfreeze(model: nn.Sequential) -> None:
    model[0].bias.requires_grad_(True)


def tie(model: nn.Sequential) -> None:
    model[3].weight = model[0].weight


CHANGES = (replace, add, add_raw, swap_parameter, freeze, freeze_layer, unfreeze, tie)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("request_", [NORMS, EVERYTHING], ids=["norms", "everything"])
def test_what_changes_between_two_steps_is_seen(change: Callable[[nn.Sequential], None], request_) -> None:
    """At most one measurement fails, where a path appears that has not been seen; none is wrong."""
    model = network()
    model[0].bias.requires_grad_(False)
    instrument = PerExample().open(model, request_)
    for _ in range(5):
        assert_exact(instrument, lambda m: losses_of(m, (X,)))
    change(model)
    failures = []
    for _ in range(4):
        try:
            assert_exact(instrument, lambda m: losses_of(m, (X,)))
        except InvalidMeasurement as error:
            failures.append(str(error))
    assert len(failures) <= 1
    assert all("seen before" in failure for failure in failures)


@pytest.mark.parametrize(
    "part", [nn.BatchNorm1d(4), nn.Embedding(4, 4, scale_grad_by_freq=True)], ids=("norm", "table")
)
def test_a_module_that_mixes_examples_is_seen_when_it_comes_or_is_put_into_training_mode(part: nn.Module) -> None:
    model = network()
    instrument = PerExample().open(model, NORMS)
    assert_exact(instrument, lambda m: losses_of(m, (X,)))
    model.append(part)
    with pytest.raises(BatchCoupledModule, match=rf"^4 \({type(part).__name__}\) "), instrument.micro_batch():
        pass
    del model[4]
    assert_exact(instrument, lambda m: losses_of(m, (X,)))
    model.train()
    with pytest.raises(BatchCoupledModule, match=r"^1 \(BatchNorm1d\) "), instrument.micro_batch():
        pass


def test_a_normalisation_without_parameters_mixes_examples_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))
    coupled = Survey.of(model).coupled
    assert coupled is not None
    assert coupled[0] == "1"
    with pytest.raises(BatchCoupledModule, match="1 \\(BatchNorm1d\\)"):
        PerExample().open(model, NORMS)
    model.eval()
    assert Survey.of(model).coupled is None
