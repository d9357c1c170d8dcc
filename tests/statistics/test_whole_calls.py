"""Layers that no rule knows by name: counted by their own vector-Jacobian products, or left to the fallback."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adadagrad.core.errors import AdadagradError, UncoveredParameter
from adadagrad.statistics import GradientMeter, PerExample
from tests.oracles import naive_statistics, relative_error
from tests.statistics.checking import EVERYTHING, NORMS, Composite, assert_exact, floats, losses_of, measure_once

X, SEQUENCE = (floats(6, 4),), (floats(6, 5, 4),)
BOTH = pytest.mark.parametrize("request_", [NORMS, EVERYTHING], ids=["norms", "everything"])


class Custom(nn.Module):
    """A leaf that no rule knows: a gain and a mixing matrix, used in whatever way the function says."""

    def __init__(self, function: Callable[..., Any], width: int = 4) -> None:
        super().__init__()
        self.function = function
        self.gain = nn.Parameter(torch.randn(width))
        self.mix = nn.Parameter(torch.randn(width, width))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def around(function: Callable[..., Any], call: Callable[..., Any] | None = None) -> nn.Module:
    """Linear, the custom leaf, Linear, dropout: with the fallback there would be no measurement."""
    torch.manual_seed(3)
    call = call or (lambda m, h: m.leaf(h))
    forward = lambda m, x: m.drop(m.b(call(m, m.a(x)))).relu_()  # noqa: E731
    parts = {"a": nn.Linear(4, 4), "leaf": Custom(function), "b": nn.Linear(4, 3), "drop": nn.Dropout(0.3)}
    return Composite(forward, **parts).double()


def seeded(m: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    torch.manual_seed(5)
    return losses_of(m, args)


def mixed(leaf: Custom, x: Tensor) -> Tensor:
    return torch.tanh(x @ leaf.mix) * leaf.gain.exp()


def by_value(leaf: Custom, x: Tensor) -> Tensor:
    return mixed(leaf, x) if float(x.detach().sum()) < 1e9 else x


def softmaxed(leaf: Custom, x: Tensor) -> Tensor:
    return torch.softmax(x * leaf.gain, -1)


def two_outputs(leaf: Custom, x: Tensor, *, other: Tensor, scale: float) -> dict[str, Tensor | int]:
    return {"sum": x * leaf.gain + other @ leaf.mix * scale, "product": x * other * leaf.gain, "count": 3}


def both(m: nn.Module, h: Tensor) -> Tensor:
    found = m.leaf(h, other=torch.tanh(h), scale=0.5)
    return found["sum"] + found["product"].exp()


def rotated(leaf: Custom, x: Tensor, by: Tensor) -> Tensor:
    return (x @ by) * leaf.gain @ leaf.mix


COUNTED = {
    "mixed": (mixed, None),
    "a decision by value": (by_value, None),
    "its own backward needs its output": (softmaxed, None),
    "keywords, two inputs, two outputs": (two_outputs, both),
    "one output is not used": (two_outputs, lambda m, h: m.leaf(h, other=h, scale=2.0)["sum"]),
    "an argument that all examples share": (rotated, lambda m, h: m.leaf(h, torch.eye(4).roll(1, 0).to(h))),
    "called twice": (mixed, lambda m, h: m.leaf(m.leaf(h))),
    "in place behind it": (mixed, lambda m, h: m.leaf(h).sigmoid_()),
    "examples in the second dimension": (mixed, lambda m, h: m.leaf(h.unsqueeze(0).repeat(3, 1, 1)).sum(0)),
    "a shift beside a product": (lambda leaf, x: x @ leaf.mix + leaf.gain, None),
    "checkpointed": (mixed, lambda m, h: checkpoint(m.leaf, h, use_reentrant=False)),
    "checkpointed, with other layers": (
        mixed,
        lambda m, h: checkpoint(lambda h: m.a(m.leaf(h)).relu(), h, use_reentrant=False),
    ),
}


@BOTH
@pytest.mark.parametrize("name", list(COUNTED))
def test_counted_beside_dropout(name: str, request_) -> None:
    model = around(*COUNTED[name])
    instrument = PerExample().open(model, request_)
    for _ in range(4):
        assert assert_exact(instrument, lambda m: seeded(m, X)) == []
    assert not instrument.fallback


@BOTH
def test_a_reentrant_checkpoint(request_) -> None:
    model, twin = around(mixed, lambda m, h: checkpoint(m.leaf, h, use_reentrant=True)), around(mixed)
    instrument = PerExample().open(model, request_)
    for _ in range(4):
        assert assert_exact(instrument, lambda m: seeded(m, X), expected_from=twin) == []


def counting(leaf: Custom, x: Tensor) -> Tensor:
    leaf.calls += 1
    return x * leaf.gain @ leaf.mix * (1 + leaf.calls)


def in_place(leaf: Custom, x: Tensor) -> Tensor:
    return x.mul_(leaf.gain).exp() * leaf.gain @ leaf.mix


def noisy(leaf: Custom, x: Tensor) -> Tensor:
    return F.dropout(x * leaf.gain, 0.3) @ leaf.mix


GENERATOR = torch.Generator().manual_seed(1)


def secretly_noisy(leaf: Custom, x: Tensor) -> Tensor:
    return x * torch.randn(x.shape, dtype=x.dtype, generator=GENERATOR) * leaf.gain @ leaf.mix


@BOTH
@pytest.mark.filterwarnings("ignore:.*no rule counts")
@pytest.mark.parametrize("function", [noisy, secretly_noisy, counting])
def test_what_cannot_be_done_over_is_refused_and_never_wrong(function, request_) -> None:
    """Random numbers are drawn, seen by torch or not; a buffer counts the calls."""
    instrument = PerExample().open(around(function), request_)
    for _ in range(4):
        with pytest.raises(AdadagradError):
            measure_once(instrument, lambda m: losses_of(m, X))


@pytest.mark.filterwarnings("ignore:.*no rule counts")
def test_an_input_changed_inside_goes_to_the_fallback() -> None:
    model = around(in_place, lambda m, h: m.leaf(h * 1.0))
    model.drop.p = 0.0
    instrument = PerExample().open(model, EVERYTHING)
    for _ in range(4):
        assert_exact(instrument, lambda m: losses_of(m, X))
    assert {"leaf.gain", "leaf.mix"} <= instrument.fallback.keys()


@pytest.mark.filterwarnings("ignore:.*no rule counts")
def test_a_leaf_that_is_used_past_its_forward_goes_to_the_fallback() -> None:
    model = around(mixed, lambda m, h: m.leaf(h) @ m.leaf.mix)
    model.drop.p = 0.0
    instrument = PerExample().open(model, EVERYTHING)
    for _ in range(4):
        assert_exact(instrument, lambda m: losses_of(m, X))
    assert list(instrument.fallback) == ["leaf.mix"]


def test_a_weight_shared_with_a_layer_that_has_a_rule() -> None:
    model = around(mixed)
    model.leaf.mix = model.a.weight
    instrument = PerExample().open(model, EVERYTHING)
    for _ in range(4):
        assert assert_exact(instrument, lambda m: seeded(m, X)) == []


def test_a_parameter_under_two_names_in_one_leaf() -> None:
    model = around(lambda leaf, x: torch.tanh(x @ leaf.mix) @ leaf.again)
    model.leaf.again = model.leaf.mix
    before = [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
    instrument = PerExample().open(model, EVERYTHING)
    for _ in range(4):
        assert assert_exact(instrument, lambda m: seeded(m, X)) == []
    assert [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)] == before


def test_a_table_in_a_module_of_its_own_is_counted_where_it_is_broadcast() -> None:
    model = around(lambda leaf: leaf.gain, lambda m, h: h + m.leaf())
    model.leaf.mix.requires_grad_(False)
    instrument = PerExample().open(model, EVERYTHING)
    for _ in range(4):
        assert assert_exact(instrument, lambda m: seeded(m, X)) == []


def test_a_leaf_that_mixes_the_examples_is_refused() -> None:
    instrument = PerExample().open(around(lambda leaf, x: (x - x.mean(0)) * leaf.gain @ leaf.mix), NORMS)
    for _ in range(3):
        with pytest.raises(AdadagradError, match="other examples"):
            measure_once(instrument, lambda m: losses_of(m, X))


def test_a_frozen_part_does_not_count() -> None:
    model = around(mixed)
    model.leaf.mix.requires_grad_(False)
    instrument = PerExample().open(model, EVERYTHING)
    for _ in range(4):
        assert assert_exact(instrument, lambda m: seeded(m, X)) == []


def test_several_backwards_are_refused_and_a_state_is_taken_over() -> None:
    instrument = PerExample().open(around(mixed), NORMS)
    for _ in range(3):
        measure_once(instrument, lambda m: seeded(m, X))
    other = PerExample().open(instrument.model, NORMS)
    other.load_state_dict(instrument.state_dict())
    assert other.state_dict() == instrument.state_dict()
    assert measure_once(other, lambda m: seeded(m, X)) == measure_once(instrument, lambda m: seeded(m, X))
    instrument.model.zero_grad()
    with instrument.micro_batch():
        loss = seeded(instrument.model, X).mean()
        loss.backward(retain_graph=True)
        loss.backward()
    with pytest.raises(AdadagradError, match="several backward"):
        instrument.finish()


def test_a_measurement_changes_no_bit_of_the_gradient() -> None:
    model = around(mixed)
    instrument = PerExample().open(model, EVERYTHING)
    for _ in range(4):
        measure_once(instrument, lambda m: seeded(m, X))
        measured = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        seeded(model, X).mean().backward()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), measured, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_leaf_is_done_over_in_the_precision_of_the_forward(dtype: torch.dtype) -> None:
    model = around(mixed).float()
    x = (floats(32, 4).float(),)
    meter = GradientMeter(model, PerExample(), inner_products=True)
    for _ in range(2):
        model.zero_grad()
        with meter:
            with torch.autocast("cpu", dtype):
                values = seeded(model, x)
            values.float().mean().backward()
        statistics = meter.statistics()
        expected = naive_statistics(model, lambda m: seeded(m, x))
        assert relative_error(statistics.variance_trace, expected.variance_trace) < 1e-2
        assert relative_error(statistics.inner_product_variance, expected.inner_product_variance) < 2e-2


def test_the_whole_model_is_no_layer() -> None:
    assert assert_exact(PerExample().open(Custom(mixed).double(), NORMS), lambda m: losses_of(m, X))
    with pytest.raises(UncoveredParameter, match="gain"):
        measure_once(PerExample().open(Custom(noisy).double(), NORMS), lambda m: losses_of(m, X))


def test_a_bias_that_is_sometimes_added_and_sometimes_fused_is_always_counted() -> None:
    """Whether torch adds it for itself, where it could be met, may depend on the number of examples."""
    turned = lambda leaf, x: F.linear(x.unsqueeze(1).repeat(1, 3, 1).transpose(0, 1), leaf.mix, leaf.gain).sum(0)  # noqa: E731
    model = around(turned)
    instrument = PerExample().open(model, EVERYTHING)
    for n in (6, 6, 1, 2, 1, 6, 1):
        measure_once(instrument, lambda m, n=n: seeded(m, (floats(n, 4),)))
    assert not instrument.fallback


def test_nothing_is_kept_alive_by_a_measured_step() -> None:
    """A tap that held its own outputs would be a cycle through autograd's graph, which is never collected."""
    kept: list[weakref.ref[Tensor]] = []

    def call(m: nn.Module, h: Tensor) -> Tensor:
        y, _ = m.leaf(h, other=h, scale=1.0)["sum"], kept.append(weakref.ref(h))
        kept.append(weakref.ref(y))
        return y

    instrument = PerExample().open(around(two_outputs, call), NORMS)
    for _ in range(4):
        measure_once(instrument, lambda m: seeded(m, X))
    gc.collect()
    assert len(kept) > 8
    assert all(reference() is None for reference in kept)


@pytest.mark.filterwarnings("ignore:.*Dynamo.*")
def test_a_layer_of_a_compiled_model_is_seen_whole_as_well() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 4), Custom(mixed), nn.Linear(4, 3)).double()
    compiled = torch.compile(model, backend="aot_eager")
    instrument = PerExample().open(compiled, NORMS)
    for _ in range(4):
        assert_exact(instrument, lambda m: losses_of(m, X), expected_from=model)
    assert not instrument.fallback
    torch._dynamo.reset()
