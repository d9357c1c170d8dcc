"""Which places in a graph count as a meeting of a shared tensor with the examples, and which do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from adadagrad.core.errors import AdadagradError, InvalidMeasurement
from adadagrad.statistics import PerExample
from adadagrad.statistics.broadcast import RAW, Meeting, uses_of
from adadagrad.statistics.meetings import find_meetings
from tests.statistics.checking import EVERYTHING, NORMS, Composite, assert_exact, floats, losses_of, measure_once

KEY = ("t", RAW)
SEQUENCE = (floats(6, 5, 4),)


def table(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))


FOUND: list[tuple[str, Callable[[Tensor, Tensor], object], tuple[Meeting, ...]]] = [
    ("added", lambda x, t: x + t, (Meeting("Add", 1, 0),)),
    ("added to", lambda x, t: t + x, (Meeting("Add", 0, 0),)),
    ("through views", lambda x, t: x - t[None, :, :].permute(0, 2, 1).mT, (Meeting("Sub", 1, 0),)),
    ("expanded", lambda x, t: t.expand(len(x), 5, 4) * x, (Meeting("Expand", 0, 0),)),
    ("second dimension", lambda x, t: (x.transpose(0, 1) + t[:, None]).transpose(0, 1), (Meeting("Add", 1, 1),)),
    ("twice", lambda x, t: (x + t, x.exp() - t), (Meeting("Add", 1, 0), Meeting("Sub", 1, 0))),
]


@pytest.mark.parametrize(("function", "meetings"), [row[1:] for row in FOUND], ids=[row[0] for row in FOUND])
def test_meetings(function, meetings: tuple[Meeting, ...]) -> None:
    t = table(5, 4)
    found = find_meetings(lambda rows: (function(floats(9, 5, 4)[rows].float(), t), {}), {t: KEY}, 4)
    assert found == {KEY: meetings}


MISSED: list[tuple[str, Callable[[Tensor, Tensor], object]]] = [
    ("multiplied", lambda x, t: x * t),
    ("added and multiplied", lambda x, t: (x + t) * t),
    ("added and returned", lambda x, t: (x + t, t)),
    ("added, and a view of it returned", lambda x, t: (x + t, t[:, :2])),
    ("a row for each example", lambda x, t: x + t.repeat(2, 1)[: len(x), None]),
    ("a row of it for each example", lambda x, t: x.new_zeros(len(x), 4) + t.repeat(2, 1)[: len(x)]),
    ("not added to the examples", lambda x, t: x * (t + x.new_ones(7, 5, 4)).mean(0)),
    ("added where the examples are in another order", lambda x, t: (x.flip(0) + t).flip(0)),
    ("added where the examples are mixed", lambda x, t: (x + t).cumsum(0)),
    ("no output has a batch", lambda x, t: (x + t).sum()),
    ("positions and examples in one dimension", lambda x, t: (x.flatten(0, 1) + t[0]).unflatten(0, (len(x), 5))),
    ("not used", lambda x, t: x.exp()),
]


@pytest.mark.parametrize("function", [row[1] for row in MISSED], ids=[row[0] for row in MISSED])
def test_no_meetings(function) -> None:
    t = table(5, 4)
    assert find_meetings(lambda rows: (function(floats(9, 5, 4)[rows].float(), t), {}), {t: KEY}, 4) == {}


def test_a_table_with_a_row_for_each_place_in_the_batch_is_not_shared() -> None:
    """Row i reaches output i alone, but the operation broadcasts over positions and not over the examples."""
    t = table(9, 4)
    rowed = lambda rows: (floats(9, 5, 4)[rows].float() + t[: len(rows), None], {})  # noqa: E731
    assert find_meetings(rowed, {t: KEY}, 4) == {}


def test_the_output_of_a_shared_layer_that_is_returned_as_well_is_not_counted() -> None:
    y = table(5, 4) * 1.0
    x = floats(6, 5, 4).float()
    nodes = {y.grad_fn: (KEY, y.shape)}
    assert list(uses_of(x + y, nodes, {})) == [KEY]
    assert uses_of((x + y, y), nodes, {}) == {}


def test_a_use_that_appears_with_the_number_of_examples_is_no_meeting() -> None:
    t = table(5, 4)
    several = lambda rows: (sum((floats(9, 5, 4)[rows].float() + t for _ in rows), torch.zeros(())), {})  # noqa: E731
    assert find_meetings(several, {t: KEY}, 4) == {}


def test_uses_come_in_the_order_of_the_graph_and_with_the_operands_shape() -> None:
    t = table(5, 4)
    x = floats(6, 5, 4).float()
    (uses,) = uses_of([(x + t[2:3]).exp() - t], {}, {t: KEY}).values()
    assert [(use.kind, tuple(use.shape), use.end is None) for use in uses] in (
        [("Add", (1, 4), False), ("Sub", (5, 4), True)],
        [("Sub", (5, 4), True), ("Add", (1, 4), False)],
    )
    again = uses_of([(x + t[2:3]).exp() - t], {}, {t: KEY})[KEY]
    assert [use.kind for use in uses] == [use.kind for use in again]


@pytest.mark.filterwarnings("ignore:.*no rule counts")
@pytest.mark.parametrize("request_", [NORMS, EVERYTHING], ids=["norms", "everything"])
@pytest.mark.parametrize(
    ("layer", "constant"),
    [
        (lambda: nn.GroupNorm(2, 4), torch.arange(16.0).view(4, 4)),
        (lambda: nn.Conv1d(3, 4, 2), torch.arange(60.0).view(4, 3, 5)),
    ],
    ids=["group norm", "convolution"],
)
def test_a_constant_of_several_rows_is_no_example(layer, constant: Tensor, request_) -> None:
    """As many rows as channels, so that rows taken for channels would not be seen in the shapes."""
    model = Composite(lambda m, x: m.a(x)[:, None] + m.c(constant.to(x)), a=nn.Linear(4, 4), c=layer()).double()
    instrument = PerExample().open(model, request_)
    for _ in range(4):
        assert_exact(instrument, lambda m: losses_of(m, (floats(6, 4, 4),)))


def test_a_backward_after_the_micro_batch_delivers_nothing() -> None:
    model = Composite(lambda m, x: x + m.t, t=table(5, 4)).double()
    instrument = PerExample().open(model, NORMS)
    for _ in range(3):
        measure_once(instrument, lambda m: losses_of(m, SEQUENCE))
    model.zero_grad()
    with instrument.micro_batch():
        loss = losses_of(model, SEQUENCE).mean()
        loss.backward(retain_graph=True)
    loss.backward()
    model.t.grad /= 2
    expected = losses_of(model, SEQUENCE)
    rows = torch.stack([torch.autograd.grad(value, model.t, retain_graph=True)[0].flatten() for value in expected])
    assert instrument.finish().variance_trace == pytest.approx(float(rows.var(0).sum()), rel=1e-12)


def test_a_table_that_meets_something_else_than_the_examples_later_is_not_counted() -> None:
    """Six rows and six examples: the operation is the same, the dimension as long, and another one."""
    switch = [0]

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return x + m.t if switch[0] == 0 else (m.t + m.columns.expand(1, 5, 4)) * x

    model = Composite(forward, t=table(1, 5, 4), columns=table(1, 5, 4).requires_grad_(False)).double()
    instrument = PerExample().open(model, NORMS)
    for _ in range(3):
        assert_exact(instrument, lambda m: losses_of(m, SEQUENCE))
    switch[0] = 1
    with pytest.raises(AdadagradError):
        measure_once(instrument, lambda m: losses_of(m, SEQUENCE))
    with pytest.raises(InvalidMeasurement, match="nothing was measured"):
        instrument.finish()
