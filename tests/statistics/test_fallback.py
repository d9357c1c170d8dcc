"""Parameters that no rule counts are counted by rerunning the model, exactly, or refused by name."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from adadagrad.core.errors import UncoveredParameter
from adadagrad.statistics import GradientMeter, PerExample
from tests.oracles import naive_statistics, relative_error
from tests.statistics.checking import (
    EVERYTHING,
    NORMS,
    Composite,
    assert_exact,
    floats,
    losses_of,
    measure_once,
)

X = (floats(6, 4),)


def with_gain(function) -> nn.Module:
    torch.manual_seed(4)
    gain = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    return Composite(function, a=nn.Linear(4, 3), b=nn.Linear(3, 2), gain=gain).double()


def features_and_logits(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    features = torch.tanh(m.a(x) * m.gain)
    return features, m.b(features)


def one_output_twice(m: nn.Module, x: Tensor) -> dict[str, Tensor]:
    y = m.a(x) * m.gain
    return {"first": y, "second": y}


def zero_shift(m: nn.Module, x: Tensor) -> Tensor:
    return torch.softmax(m.a(x) + m.gain.sum(), -1)


@pytest.mark.filterwarnings("ignore:.*no rule counts")
@pytest.mark.parametrize("request_", [NORMS, EVERYTHING], ids=["norms", "everything"])
@pytest.mark.parametrize("function", [features_and_logits, one_output_twice, zero_shift])
def test_outputs_of_every_kind(function, request_) -> None:
    """An output computed from another, one returned twice, and a parameter whose gradient is zero up to rounding."""
    instrument = PerExample().open(with_gain(function), request_)
    for _ in range(4):
        assert_exact(instrument, lambda m: losses_of(m, X))
    assert "gain" in instrument.fallback


@pytest.mark.filterwarnings("ignore:.*no rule counts")
def test_a_call_of_the_model_that_the_loss_ignores() -> None:
    instrument = PerExample().open(with_gain(lambda m, x: m.a(x) * m.gain), EVERYTHING)

    def losses(m: nn.Module) -> Tensor:
        y = m(X[0])
        m(X[0] + 1)
        return y.square().sum(1)

    for _ in range(4):
        assert_exact(instrument, losses)


@pytest.mark.filterwarnings("ignore:.*no rule counts")
def test_an_output_changed_in_place() -> None:
    instrument = PerExample().open(with_gain(lambda m, x: m.a(x) * m.gain), EVERYTHING)
    for _ in range(4):
        assert_exact(instrument, lambda m: m(X[0]).relu_().square().sum(1))


def one_module_twice(m: nn.Module, x: Tensor) -> Tensor:
    return m.c(torch.tanh(m.a(x))) * m.gain.exp()


def one_module_twice_by_value(m: nn.Module, x: Tensor) -> Tensor:
    """Looking at a value is what vmap cannot do, so that examples are rerun one at a time."""
    return one_module_twice(m, x) if float(x.sum()) < 1e9 else x


@pytest.mark.filterwarnings("ignore:.*no rule counts")
@pytest.mark.parametrize("request_", [NORMS, EVERYTHING], ids=["norms", "everything"])
@pytest.mark.parametrize("function", [one_module_twice, one_module_twice_by_value])
def test_a_rerun_puts_every_parameter_back(function, request_) -> None:
    """Also of a module under two names, and of a weight in two modules: an optimizer holds these very objects."""
    torch.manual_seed(4)
    twice, tied = nn.Linear(4, 4), nn.Linear(4, 4)
    tied.weight = twice.weight
    parts = {"a": nn.Sequential(twice, nn.Tanh(), tied), "c": twice, "gain": nn.Parameter(torch.ones(4))}
    model = Composite(function, **parts).double()
    before = [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
    instrument = PerExample().open(model, request_)
    for _ in range(4):
        assert_exact(instrument, lambda m: losses_of(m, X))
        assert [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)] == before
        assert all(p.grad is not None for p in model.parameters())
    assert "gain" in instrument.fallback


@dataclass
class Output:
    logits: Tensor


@pytest.mark.filterwarnings("ignore:.*no rule counts")
def test_an_output_that_cannot_be_looked_into_is_refused() -> None:
    """A data class is opaque to torch's pytrees: its tensors' gradients are not seen, and never taken for zero."""
    instrument = PerExample().open(with_gain(lambda m, x: Output(m.a(x) * m.gain)), NORMS)
    for _ in range(4):
        with pytest.raises(UncoveredParameter, match="gain"):
            measure_once(instrument, lambda m: m(X[0]).logits.square().sum(1))


@pytest.mark.filterwarnings("ignore:.*no rule counts")
def test_no_backward_after_a_fallback_is_known_is_no_measurement() -> None:
    model = with_gain(lambda m, x: m.a(x) * m.gain)
    instrument = PerExample().open(model, NORMS)
    measure_once(instrument, lambda m: losses_of(m, X))
    model.zero_grad()
    with instrument.micro_batch():
        loss = losses_of(model, X).mean()
    loss.backward()
    with pytest.raises(Exception, match="no backward ran"):
        instrument.finish()


@pytest.mark.filterwarnings("ignore:.*no rule counts")
def test_a_rerun_leaves_buffers_alone() -> None:
    """Spectral norm in training mode improves its vectors at every forward; measuring must not do so once more."""
    torch.manual_seed(4)
    build = lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Linear(3, 2)).double()  # noqa: E731
    measured, plain = build(), build()
    plain.load_state_dict(measured.state_dict())
    instrument = PerExample().open(measured, NORMS)
    for _ in range(4):
        with contextlib.suppress(UncoveredParameter):  # raised until the vectors have converged
            measure_once(instrument, lambda m: losses_of(m, X))
        losses_of(plain, X).mean().backward()
    assert all(torch.equal(a, b) for a, b in zip(measured.buffers(), plain.buffers(), strict=True))


@pytest.mark.filterwarnings("ignore:.*no rule counts")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rerun_computes_in_the_precision_of_the_forward(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    seen = set()

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        hidden = m.a(x)
        seen.add(hidden.dtype)
        return m.b(torch.tanh(hidden)) * m.gain

    model = Composite(
        forward,
        a=nn.Linear(40, 30),
        b=nn.Linear(30, 20),
        gain=nn.Parameter(torch.ones(20)),
    )
    x = floats(16, 3, 40).float()
    meter = GradientMeter(model, PerExample(), inner_products=True)
    for _ in range(2):
        model.zero_grad()
        seen.clear()
        with meter:
            with torch.autocast("cpu", dtype):
                values = losses_of(model, (x,))
            values.float().mean().backward()
        statistics = meter.statistics()
        assert seen == {dtype}
        expected = naive_statistics(model, lambda m: losses_of(m, (x,)))
        assert relative_error(statistics.variance_trace, expected.variance_trace) < 5e-3
        assert relative_error(statistics.inner_product_variance, expected.inner_product_variance) < 1e-2
