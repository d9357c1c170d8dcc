"""What all examples share: which calls are taken in, which uses are those of the trial runs, what is given up."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from adadagrad.core.errors import InvalidMeasurement
from adadagrad.statistics import PerExample
from adadagrad.statistics.broadcast import RAW, Meeting, Use, uses_of
from adadagrad.statistics.calls import LayerCall
from adadagrad.statistics.meetings import find_meetings
from adadagrad.statistics.rules import find_rule
from adadagrad.statistics.rules.base import own_parameters
from adadagrad.statistics.shared import SharedTensors, _as_before
from tests.statistics.checking import NORMS, Composite, assert_exact, floats, losses_of

N = 6
KEY = ("c", 0)
ADDED = Meeting("Add", 1, 0)


def call_of(layer: nn.Module) -> LayerCall:
    rule = find_rule(layer)
    assert rule is not None
    return LayerCall("c", layer, rule, own_parameters(layer), (0, 0))


def listening() -> SharedTensors:
    return SharedTensors({KEY: (ADDED,)}, {}, lambda error: None)


@pytest.mark.parametrize(
    ("layer", "shape", "taken"),
    [
        (nn.GroupNorm(2, 4), (1, 4, 3), True),
        (nn.GroupNorm(2, 4), (4, 4), False),
        (nn.GroupNorm(2, 4), (4, 4, 3), False),
        (nn.LayerNorm(4), (4, 4), True),
        (nn.Linear(4, 3), (4,), True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_a_group_norm_takes_its_first_dimension_for_examples(
    layer: nn.Module, shape: tuple[int, ...], taken: bool
) -> None:
    layer, x = layer.double(), floats(*shape)
    assert listening().add_call(KEY, call_of(layer), x, layer(x), N) == taken


def added(t: Tensor) -> Use:
    """Return the use of t in a graph that adds it to six examples."""
    (uses,) = uses_of(floats(N, 5, 4) + t, {}, {t: ("t", RAW)}).values()
    return uses[0]


@pytest.mark.parametrize("change", [{}, {"kind": "Sub"}, {"operand": 0}, {"dim": 1}, {"dim": 3}], ids=str)
def test_a_use_is_the_one_of_the_trial_runs_in_every_respect(change: dict[str, object]) -> None:
    use = added(nn.Parameter(floats(5, 4)))
    assert _as_before(N, use, dataclasses.replace(ADDED, **change)) == (not change)
    assert not _as_before(N + 1, use, ADDED)


def test_a_use_with_the_examples_own_extent_is_no_broadcast() -> None:
    assert not _as_before(N, added(nn.Parameter(floats(N, 5, 4))), ADDED)
    assert _as_before(N, added(nn.Parameter(floats(1, 5, 4))), ADDED)


@pytest.mark.parametrize("as_before", [True, False])
def test_parameters_that_meet_the_examples_elsewhere_are_given_up(as_before: bool) -> None:
    layer, x, tensors = nn.Linear(4, 3).double(), floats(5, 4), listening()
    y = layer(x)
    assert tensors.add_call(KEY, call_of(layer), x, y, N)
    data = floats(N, 5, 3)
    lost = tensors.listen(data + y if as_before else y + data, N)
    assert lost == (set() if as_before else set(layer.parameters()))


def graph(rows: int, shared_rows: int | None, repeated: int = 1):
    """Return a model's output of so many examples, to which something is added, and that something's node."""
    x, w = floats(9, 4 * repeated)[:rows].requires_grad_(), floats(9, 4).requires_grad_()
    shared = (w[0] if shared_rows is None else w[: shared_rows or rows]) * 2
    wide = shared.repeat(1 if shared.dim() > 1 else rows, repeated) if repeated > 1 else shared
    return x * 1.0 + wide, {shared.grad_fn: (KEY, shared.shape)}


@pytest.mark.parametrize(
    ("shared_rows", "repeated", "meets"),
    [(None, 1, "Add"), (1, 1, "Add"), (0, 1, None), (None, 2, None)],
    ids=["a vector", "one row", "a row for each example", "repeated along the features too"],
)
def test_only_what_is_broadcast_over_the_examples_alone_meets_them(
    shared_rows: int | None, repeated: int, meets: str | None
) -> None:
    found = find_meetings(lambda rows: graph(len(rows), shared_rows, repeated), {}, 3)
    assert found == ({} if meets is None else {KEY: (Meeting(meets, 1, 0),)})


def test_an_input_changed_after_the_backward_is_reported() -> None:
    torch.manual_seed(5)
    model = Composite(lambda m, x: m.a(x) + m.c(m.constant), a=nn.Linear(4, 3), c=nn.Linear(2, 3)).double()
    model.constant, x = floats(5, 2), floats(N, 5, 4)
    instrument = PerExample().open(model, NORMS)
    for _ in range(4):
        assert_exact(instrument, lambda m: losses_of(m, (x,)))
    model.zero_grad()
    with instrument.micro_batch():
        losses_of(model, (x,)).mean().backward()
        model.constant.mul_(2)
    with pytest.raises(InvalidMeasurement, match="the input of c was changed in place after the call"):
        instrument.finish()
