"""Fused rules: the trained gradient within rounding of the ordinary one, the norms those of the loop over examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adadagrad.core.errors import AdadagradError, InvalidMeasurement
from adadagrad.statistics import PerExample
from adadagrad.statistics.base import Request
from adadagrad.statistics.coordinate import reduce_ratio
from adadagrad.statistics.fusing import Fused, fused_call
from adadagrad.statistics.rules import FUSED, AbstractRule, chunking, find_rule, fused_convolution, fused_linear
from adadagrad.statistics.rules.convolution import ConvolutionRule
from adadagrad.statistics.rules.patch_gram import gram_is_cheaper, gram_square_norms
from adadagrad.statistics.rules.squaring import SquareSums, Squaring
from tests.oracles import example_gradients, naive_statistics, relative_error
from tests.statistics.checking import (
    BLOCKS,
    EVERYTHING,
    NORMS,
    Composite,
    assert_close,
    floats,
    losses_of,
    measure_once,
)

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (6, 5, 4)),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), (6, 2, 5, 4)),
    "conv1d": (lambda: nn.Conv1d(8, 4, 3, 2, 1), (6, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 6, 3, (2, 1), (1, 0), dilation=(1, 2)), (6, 8, 9, 7)),
    "conv2d, groups": (lambda: nn.Conv2d(8, 6, 3, groups=2, bias=False), (6, 8, 5, 6)),
    "conv2d, few channels": (lambda: nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 2), dilation=(1, 2)), (6, 2, 9, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), (6, 2, 3, 4, 3)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (6, 4, 3, 3)),
    "layer norm": (lambda: nn.LayerNorm(4), (6, 5, 4)),
    "layer norm, two dimensions": (lambda: nn.LayerNorm((3, 4)), (6, 5, 3, 4)),
}


STEPS = 4
"""The fourth step is the first that does not verify, and so the first that is fused."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the layers whose backward was fused."""
    seen: list[str] = []
    for rule in {type(rule) for rule in FUSED.values()}:
        monkeypatch.setattr(rule, "backward", counting(rule.backward, seen))
    return seen


def counting(backward: Callable[..., Any], seen: list[str]) -> Callable[..., Any]:
    def count(self: object, layer: nn.Module, *args: object, **kwargs: object) -> Any:
        seen.append(type(layer).__name__)
        return backward(self, layer, *args, **kwargs)

    return count


def train(
    model: nn.Module, x: Tensor, estimator: PerExample | None = None, oracle: nn.Module | None = None
) -> list[Tensor]:
    """Measure some steps on the same batch; return the gradients of the last and check its statistics."""
    instrument = (estimator or PerExample()).open(model, Request())
    for _ in range(STEPS):
        model.zero_grad()
        x.grad = None
        with instrument.micro_batch():
            losses_of(model, (x,)).mean().backward()
        statistics = instrument.finish()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    expected = naive_statistics(oracle or model, lambda m: losses_of(m, (x,)))
    assert relative_error(statistics.variance_trace, expected.variance_trace) < 1e-10
    assert relative_error(statistics.grad_norm_sq, expected.grad_norm_sq) < 1e-10
    return gradients


@pytest.mark.parametrize("name", LAYERS)
def test_norms_are_fused_beside_products_and_coordinates(name: str, calls: list[str]) -> None:
    layer, shape = LAYERS[name]
    torch.manual_seed(5)
    model, x = nn.Sequential(layer(), nn.ReLU(inplace=True)).double(), floats(*shape)
    instrument = PerExample().open(model, EVERYTHING)
    for _ in range(STEPS):
        statistics = measure_once(instrument, lambda m: losses_of(m, (x,)))[0]
    assert calls == [type(model[0]).__name__]
    assert_close(statistics, naive_statistics(model, lambda m: losses_of(m, (x,)), BLOCKS))


@pytest.mark.parametrize("weights", [[0.2] * 5, [0.1, 0.4, 0.2, 0.0, 0.3]], ids=["equal", "unequal"])
def test_coordinates_cost_no_product_where_examples_count_alike(
    weights: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backward adds (c_i g_ij)^2 up; only for unequal c_i the gradients are formed again."""
    torch.manual_seed(5)
    layers = [nn.Conv2d(2, 3, 3), nn.GroupNorm(3, 3), nn.Tanh(), nn.Flatten(2), nn.Linear(9, 4), nn.LayerNorm(4)]
    model, x, c = nn.Sequential(*layers).double(), floats(5, 2, 5, 5), torch.tensor(weights, dtype=torch.float64)
    instrument, formed = PerExample().open(model, EVERYTHING), []

    def watched(self: object, layer: nn.Module, *args: object) -> dict[str, Tensor]:
        formed.append(type(layer).__name__)
        return square_sums(self, layer, *args)

    square_sums = AbstractRule.square_sums
    monkeypatch.setattr(AbstractRule, "square_sums", watched)
    for _ in range(STEPS):
        model.zero_grad()
        formed.clear()
        with instrument.micro_batch(coefficients=c):
            (losses_of(model, (x,)) * c).sum().backward()
        found = instrument.finish().coordinate_ratio
    assert len(formed) == (0 if len(set(weights)) == 1 else 4)
    rows = example_gradients(model, lambda m: losses_of(m, (x,)))
    mean = c @ rows
    variances = c @ (rows - mean).square() / (1 - c.square().sum())
    sizes = [p.numel() for p in model.parameters()]
    assert relative_error(found, reduce_ratio(variances.split(sizes), mean.split(sizes), BLOCKS)) < 1e-10


@pytest.mark.parametrize("request_", [NORMS, EVERYTHING], ids=["norms", "everything"])
def test_products_of_positions_give_norms_but_no_coordinates(request_: Request, calls: list[str]) -> None:
    torch.manual_seed(5)
    model, x = nn.Sequential(nn.Conv2d(96, 96, 3, padding=1), nn.Tanh(), nn.AvgPool2d(4)).double(), floats(3, 96, 4, 4)
    instrument = PerExample().open(model, request_)
    for _ in range(STEPS):
        statistics = measure_once(instrument, lambda m: losses_of(m, (x,)))[0]
    assert calls == ([] if request_ is NORMS else ["Conv2d"])
    assert_close(statistics, naive_statistics(model, lambda m: losses_of(m, (x,)), BLOCKS))


def test_no_sums_are_left_where_a_fused_rule_fails_on_the_way() -> None:
    layer, sums = nn.Linear(4, 3).double(), SquareSums()
    x, gy = floats(6, 5, 4), floats(6, 5, 3)
    rule = Squaring(FUSED[nn.Linear], sums)
    parts = rule.backward(layer, x, (), gy, wants_x=False)[1]
    next(parts)
    assert not sums.totals
    assert list(parts) == []
    gradients = find_rule(layer).gradients(layer, x, gy, {"weight", "bias"})
    for name, total in sums.totals.items():
        torch.testing.assert_close(total, gradients[name].square().sum(0), rtol=1e-12, atol=0)
    assert sums.totals.keys() == {"weight", "bias"}


def test_squares_add_up_over_several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, sums = nn.Linear(4, 3).double(), SquareSums()
    monkeypatch.setattr(fused_linear, "PRODUCT_BYTES", 2 * layer.weight.numel() * 8)
    x, gy = floats(5, 5, 4), floats(5, 5, 3)
    assert len(list(Squaring(FUSED[nn.Linear], sums).backward(layer, x, (), gy, wants_x=False)[1])) == 3
    gradients = find_rule(layer).gradients(layer, x, gy, {"weight", "bias"})
    for name, gradient in gradients.items():
        torch.testing.assert_close(sums.totals[name], gradient.square().sum(0), rtol=1e-12, atol=0)


def ordinary(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    losses_of(model, (x,)).mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("wants_x", [False, True])
def test_gradients_and_norms(name: str, wants_x: bool, calls: list[str]) -> None:
    layer, shape = LAYERS[name]
    torch.manual_seed(5)
    model = nn.Sequential(layer(), nn.ReLU(inplace=True)).double()
    x = floats(*shape).requires_grad_(wants_x)
    fused = train(model, x)
    from_input = x.grad
    assert calls == [type(model[0]).__name__]
    x.grad = None
    for mine, theirs in zip(fused, ordinary(model, x), strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-12
    if wants_x:
        assert float((from_input - x.grad).norm() / x.grad.norm()) < 1e-12


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        lambda: nn.Conv2d(2, 3, (3, 2), padding="same"),
        lambda: nn.RMSNorm(6),
    ],
    ids=["circular", "same", "rms norm"],
)
@pytest.mark.filterwarnings("ignore:Using padding=.same.")
def test_a_layer_that_no_fused_rule_suits_is_left_as_it_is(layer: Callable[[], nn.Module], calls: list[str]) -> None:
    torch.manual_seed(5)
    model, x = nn.Sequential(layer(), nn.Tanh()).double(), floats(6, 2, 7, 6)
    gradients = train(model, x)
    assert calls == []
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(gradients, ordinary(model, x), strict=True))


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d, few channels"])
def test_gradients_add_up_over_several_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, shape = LAYERS[name]
    names = ((chunking, "CHUNK_BYTES"), (fused_convolution, "PATCH_BYTES"), (fused_linear, "PRODUCT_BYTES"))
    for module, constant in names:
        monkeypatch.setattr(module, constant, 1)
    torch.manual_seed(5)
    model, x = nn.Sequential(build(), nn.Tanh()).double(), floats(*shape)
    for mine, theirs in zip(train(model, x), ordinary(model, x), strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-12


def test_without_fusing_the_gradient_is_bitwise_the_ordinary_one(calls: list[str]) -> None:
    layer, shape = LAYERS["conv2d"]
    model, x = nn.Sequential(layer(), nn.Flatten(), nn.LazyLinear(2)).double(), floats(*shape)
    model(x)
    gradients = train(model, x, estimator=PerExample(fuse=False))
    assert calls == []
    assert all(torch.equal(a, b) for a, b in zip(gradients, ordinary(model, x), strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_repeats_the_decision(reentrant: bool, calls: list[str]) -> None:
    torch.manual_seed(2)
    a, b = nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 2))
    model = Composite(lambda m, x: checkpoint(m.b, m.a(x), use_reentrant=reentrant), a=a, b=b).double()
    oracle, x = nn.Sequential(a, b), floats(6, 3, 4)
    fused = train(model, x, oracle=oracle)
    assert sorted(calls) == ["LayerNorm", "Linear", "Linear", "Linear"]
    for mine, theirs in zip(fused, ordinary(oracle, x), strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-12


def test_a_layer_called_twice_is_fused_twice_and_its_examples_add_before_they_are_squared(calls: list[str]) -> None:
    model = Composite(lambda m, x: m.layer(torch.tanh(m.layer(x))), layer=nn.Linear(4, 4)).double()
    x = floats(6, 3, 4)
    fused = train(model, x)
    assert calls == ["Linear", "Linear"]
    for mine, theirs in zip(fused, ordinary(model, x), strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-12


def test_a_frozen_weight_or_a_parametrization_is_left_to_the_layer(calls: list[str]) -> None:
    frozen = nn.Linear(4, 3)
    frozen.weight.requires_grad_(False)
    train(nn.Sequential(frozen).double(), floats(6, 5, 4))
    assert calls == []


def test_a_failing_rule_leaves_gradient_and_measurement_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError

    monkeypatch.setattr(type(FUSED[nn.Linear]), "backward", fail)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double(), floats(6, 5, 4)
    gradients = train(model, x)
    for mine, theirs in zip(gradients, ordinary(model, x), strict=True):
        assert torch.equal(mine, theirs)


def test_a_second_derivative_is_right_and_the_measurement_invalid() -> None:
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 2)).double(), floats(6, 5, 4)
    instrument = PerExample().open(model, Request())

    def penalty(x: Tensor) -> Tensor:
        loss = losses_of(model, (x,)).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        return loss + sum(g.square().sum() for g in gradients)

    penalty(x).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    for _ in range(STEPS - 1):
        model.zero_grad()
        with instrument.micro_batch():
            losses_of(model, (x,)).mean().backward()
        instrument.finish()
    model.zero_grad()
    with instrument.micro_batch():
        penalty(x).backward()
    with pytest.raises(InvalidMeasurement):
        instrument.finish()
    for p, wanted in zip(model.parameters(), expected, strict=True):
        assert float((p.grad - wanted).norm() / wanted.norm()) < 1e-12


def test_a_graph_that_outlives_its_measurement_still_trains() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)).double(), floats(6, 5, 4)
    instrument = PerExample().open(model, Request())
    for _ in range(STEPS - 1):
        model.zero_grad()
        with instrument.micro_batch():
            losses_of(model, (x,)).mean().backward()
        instrument.finish()
    model.zero_grad()
    with instrument.micro_batch():
        late = losses_of(model, (x,)).mean()
        losses_of(model, (x,)).mean().backward()
    instrument.discard()
    model.zero_grad()
    late.backward()
    kept = [p.grad.clone() for p in model.parameters()]
    for mine, theirs in zip(kept, ordinary(model, x), strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-12


def test_the_output_may_be_changed_in_place() -> None:
    """A view made inside a custom function may not; the output of a Linear on three dimensions is one."""
    x = floats(6, 5, 4)
    leaf = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    layer = nn.Linear(4, 3).double()
    call = fused_call(layer, FUSED[nn.Linear], x, leaf)
    assert call is not None
    y = Fused.apply(x, leaf, call, lambda x, gy, squares, seconds: squares, layer.weight, layer.bias)
    y.view(30, 3).relu_()
    y.sum().backward()
    assert torch.equal(y, layer(x).relu())


@pytest.mark.parametrize(
    ("layer", "shape", "cheaper"),
    [
        (nn.Conv2d(3, 4, 3, padding=1), (5, 3, 4, 5), False),
        (nn.Conv2d(3, 4, (3, 2), (2, 1), (1, 0), dilation=(1, 2)), (5, 3, 7, 6), False),
        (nn.Conv2d(96, 96, 3, padding=1), (3, 96, 4, 4), True),
        (nn.Conv2d(96, 96, 3, 2, 1), (3, 96, 8, 8), False),
    ],
    ids=["padding", "stride and dilation", "small map", "strided"],
)
def test_norms_from_position_products(layer: nn.Conv2d, shape: tuple[int, ...], cheaper: bool) -> None:
    layer, x = layer.double(), floats(*shape)
    gy = torch.randn_like(layer(x))
    assert gram_is_cheaper(layer, x) == cheaper
    gradients = ConvolutionRule().gradients(layer, x, gy, {"weight"})["weight"]
    torch.testing.assert_close(
        gram_square_norms(layer, x, gy), gradients.flatten(1).square().sum(1), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d, few channels"])
def test_what_exists_at_a_time_does_not_grow_with_the_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a gradient of every example at once: room for those (or the patches) of two examples gives the same."""
    build, shape = LAYERS[name]
    torch.manual_seed(5)
    layer, x = build().double(), floats(7, *shape[1:])
    rule = FUSED[type(layer)]
    gy = torch.randn_like(layer(x))
    whole = [part["weight"].flatten(1).clone() for part in rule.backward(layer, x, (), gy, wants_x=False)[1]]
    one = layer.weight.numel() * x.element_size()
    if "few" in name:  # beside the bias's column; the patches of one example at a time
        one += layer.out_channels * x.element_size()
        monkeypatch.setattr(fused_convolution, "PATCH_BYTES", 1)
    for module, constant in (
        (fused_linear, "PRODUCT_BYTES"),
        (chunking, "CHUNK_BYTES"),
    ):
        monkeypatch.setattr(module, constant, 2 * one)
    parts = [part["weight"].flatten(1).clone() for part in rule.backward(layer, x, (), gy, wants_x=False)[1]]
    assert [len(part) for part in parts] == [2, 2, 2, 1]
    torch.testing.assert_close(torch.cat(parts), torch.cat(whole), rtol=1e-12, atol=1e-12)


def test_a_parameter_put_in_place_for_a_call_is_differentiated_as_it_was_called(calls: list[str]) -> None:
    """The backward comes when the layer has its own parameter again; a fused rule would take that one."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(m.second, {"weight": m.first.weight}, (torch.tanh(m.first(x)),))

    model = Composite(forward, first=nn.Linear(4, 4), second=nn.Linear(4, 4)).double()
    x = floats(6, 3, 4)
    found = train(model, x)
    assert calls == ["Linear"]
    for mine, theirs in zip(found, ordinary(model, x), strict=True):
        assert float((mine - theirs).norm()) <= 1e-12 * float(theirs.norm())


@pytest.mark.filterwarnings("ignore:.*no rule counts")
def test_a_call_outside_of_the_model_is_not_taken_for_the_only_one() -> None:
    """Its share of a weight's gradient adds to that of the call inside before it is squared, or there is no number."""
    parts = {"body": nn.Linear(4, 4), "head": nn.Linear(4, 3)}
    model = Composite(lambda m, x: m.head(torch.tanh(m.body(x))), **parts).double()
    x, instrument = floats(6, 3, 4), PerExample().open(model, NORMS)
    for _ in range(STEPS - 1):
        measure_once(instrument, lambda m: losses_of(m, (x,)))
    with pytest.raises(AdadagradError, match="head"):
        measure_once(instrument, lambda m: losses_of(m, (x,)) + m.head(x).pow(3).sum((1, 2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_position_products_stay_in_range_in_half_precision(dtype: torch.dtype) -> None:
    """Sums of 300 squares of 30, and squares of output gradients of 1e-5: beyond float16 on either side."""
    torch.manual_seed(2)
    layer = nn.Conv2d(300, 300, 2).to(dtype)
    x, gy = (30 * floats(3, 300, 2, 2).abs()).to(dtype), (1e-5 * floats(3, 300, 1, 1)).to(dtype)
    assert gram_is_cheaper(layer, x)
    wide = ConvolutionRule().gradients(layer, x.double(), gy.double(), {"weight"})["weight"]
    expected = wide.flatten(1).square().sum(1)
    assert torch.allclose(gram_square_norms(layer, x, gy), expected, rtol=1e-3)
