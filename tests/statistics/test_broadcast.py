"""Tables and layers that all examples share are counted where they are broadcast: exactly, also beside dropout."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adadagrad.core.errors import AdadagradError, InvalidMeasurement, UncoveredParameter
from adadagrad.core.reduction import CoordinateReduction
from adadagrad.statistics import GradientMeter, PerExample
from adadagrad.statistics.base import Request
from tests.oracles import naive_statistics, relative_error
from tests.statistics.cases import GPT
from tests.statistics.checking import (
    BLOCKS,
    EVERYTHING,
    NORMS,
    Composite,
    Row,
    assert_close,
    assert_exact,
    floats,
    ids,
    losses_of,
    measure_once,
)

Linear = nn.Linear
SEQUENCE, TOKENS = (floats(6, 5, 4),), (ids(11, 6, 5),)
REQUESTS = pytest.mark.parametrize("request_", [NORMS, EVERYTHING], ids=["norms", "everything"])


def table(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))


def dropped(function, **parts: nn.Module | nn.Parameter) -> nn.Module:
    """A layer, something shared that the function adds, dropout, a layer."""
    return Composite(
        lambda m, x: m.b(F.dropout(function(m, m.a(x)), 0.4)), a=Linear(4, 4), b=nn.Sequential(Linear(4, 3)), **parts
    )


def sequence_first(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x.transpose(0, 1))
    y = F.dropout(y + m.t(torch.arange(len(y))).unsqueeze(1), 0.4)
    return m.b(y).transpose(0, 1)


def class_token(m: nn.Module, x: Tensor) -> Tensor:
    y = torch.cat([m.cls.expand(len(x), -1, -1), m.patch(x).flatten(2).mT], 1)
    y = F.dropout(y + m.pos[:, : y.shape[1]], 0.3)
    return m.b(torch.tanh(y) @ y.mT.softmax(-1) @ y)[:, 0]


def embedded_twice(m: nn.Module, x: Tensor) -> Tensor:
    """One table looked up by tokens, and by positions that all examples share."""
    return m.b(F.dropout(m.e(x) + m.e(torch.arange(x.shape[1])[None]), 0.4))


def with_dropout(positions: str) -> nn.Module:
    model = GPT(positions)
    model.norm1 = nn.Sequential(nn.Dropout(0.3), model.norm1)
    return model


def two_tables(m: nn.Module, y: Tensor) -> Tensor:
    return y + m.rows + m.columns


ADDED = [
    Row("gpt, position parameter", lambda: with_dropout("parameter"), TOKENS),
    Row("gpt, position ids of one row", lambda: with_dropout("row"), TOKENS),
    Row("gpt, position ids as a vector", lambda: with_dropout("vector"), TOKENS),
    Row("gpt, as many positions as examples", lambda: with_dropout("vector"), (ids(11, 5, 5),)),
    Row("gpt, parameter, as many positions as examples", lambda: with_dropout("parameter"), (ids(11, 5, 5),)),
    Row(
        "class token and positions of a vision transformer",
        lambda: Composite(
            class_token, patch=nn.Conv2d(3, 4, 2, 2), cls=table(1, 1, 4), pos=table(1, 9, 4), b=Linear(4, 2)
        ),
        (floats(6, 3, 4, 4),),
    ),
    Row(
        "repeated token",
        lambda: dropped(lambda m, y: torch.cat([m.t.repeat(len(y), 1, 1), y], 1), t=table(1, 2, 4)),
        SEQUENCE,
    ),
    Row(
        "sequence first",
        lambda: Composite(sequence_first, a=Linear(4, 6), b=Linear(6, 3), t=nn.Embedding(5, 6)),
        SEQUENCE,
    ),
    Row(
        "sequence first, as long as the batch",
        lambda: Composite(sequence_first, a=Linear(4, 6), b=Linear(6, 3), t=nn.Embedding(5, 6)),
        (floats(5, 5, 4),),
    ),
    Row("through views", lambda: dropped(lambda m, y: y + m.t[1].mT.unsqueeze(0), t=table(2, 4, 5)), SEQUENCE),
    Row("scaled and subtracted", lambda: dropped(lambda m, y: torch.sub(y, m.t, alpha=3), t=table(5, 4)), SEQUENCE),
    Row("subtracted from", lambda: dropped(lambda m, y: torch.sub(m.t, y, alpha=3), t=table(5, 4)), SEQUENCE),
    Row("scaled and added", lambda: dropped(lambda m, y: torch.add(y, m.t, alpha=-2), t=table(5, 4)), SEQUENCE),
    Row("added in place", lambda: dropped(lambda m, y: (y * 2).add_(m.t), t=table(5, 4)), SEQUENCE),
    Row("a vector over positions too", lambda: dropped(lambda m, y: y + m.t, t=table(4)), SEQUENCE),
    Row("a number", lambda: dropped(lambda m, y: y + m.t, t=table()), SEQUENCE),
    Row("used twice, in two views", lambda: dropped(lambda m, y: y + m.t[:5] - m.t[1:], t=table(6, 4)), SEQUENCE),
    Row(
        "rows and columns, as many rows as examples",
        lambda: dropped(two_tables, rows=table(6, 1, 4), columns=table(1, 5, 4)),
        (floats(6, 6, 5, 4),),
    ),
    Row(
        "a layer on a constant",
        lambda: dropped(lambda m, y: y + m.c(torch.ones(3, dtype=y.dtype)), c=Linear(3, 4)),
        SEQUENCE,
    ),
    Row(
        "a layer on a constant of one row",
        lambda: dropped(lambda m, y: y - 2 * y + m.c(torch.ones(1, 3, dtype=y.dtype)), c=Linear(3, 4)),
        SEQUENCE,
    ),
    Row(
        "a layer norm of a constant, called twice",
        lambda: dropped(
            lambda m, y: y + m.c(torch.arange(4, dtype=y.dtype)) + m.c(y.new_ones(5, 4).cumsum(1)), c=nn.LayerNorm(4)
        ),
        SEQUENCE,
    ),
    Row(
        "a convolution of a constant image",
        lambda: Composite(
            lambda m, x: F.dropout(m.a(x) + m.c(torch.ones(1, 2, 6, 6, dtype=x.dtype)), 0.4),
            a=nn.Conv2d(3, 4, 3),
            c=nn.Conv2d(2, 4, 3),
        ),
        (floats(6, 3, 6, 6),),
    ),
    Row(
        "a group norm of a constant image",
        lambda: Composite(
            lambda m, x: F.dropout(m.a(x) + m.c(torch.arange(64.0).to(x).view(1, 4, 4, 4)), 0.4),
            a=nn.Conv2d(3, 4, 3),
            c=nn.GroupNorm(2, 4),
        ),
        (floats(6, 3, 6, 6),),
    ),
    Row(
        "one embedding for tokens and positions",
        lambda: Composite(embedded_twice, e=nn.Embedding(11, 4), b=Linear(4, 3)),
        TOKENS,
    ),
    Row("frozen", lambda: dropped(lambda m, y: y + m.t, t=table(5, 4).requires_grad_(False)), SEQUENCE),
]


def seeded(row: Row, model: nn.Module) -> Tensor:
    """The losses with the same dropout masks for the loop and for the measurement."""
    torch.manual_seed(5)
    return row.all_losses(model)


@REQUESTS
@pytest.mark.parametrize("row", ADDED, ids=lambda row: row.name)
def test_exact_beside_dropout(row: Row, request_) -> None:
    instrument = PerExample().open(row.model(), request_)
    for _ in range(4):  # the fourth measurement is the first that verifies nothing
        assert assert_exact(instrument, lambda m: seeded(row, m)) == []
    assert instrument.fallback == {}


@pytest.mark.parametrize("row", ADDED[:7], ids=lambda row: row.name)
def test_single_coordinates(row: Row) -> None:
    model = row.model()
    for reduction in (CoordinateReduction(kind="max"), CoordinateReduction(kind="quantile", quantile=0.5)):
        expected = naive_statistics(model, lambda m: seeded(row, m), reduction)
        statistics, _ = measure_once(PerExample().open(model, Request(coordinates=reduction)), lambda m: seeded(row, m))
        assert relative_error(statistics.coordinate_ratio, expected.coordinate_ratio) < 1e-6


@REQUESTS
@pytest.mark.parametrize("positions", ["parameter", "row", "vector"])
def test_micro_batches_of_unequal_size_and_one_example(positions: str, request_) -> None:
    """Also where a later micro-batch has as many examples as the table has rows."""
    torch.manual_seed(3)
    model = GPT(positions).double()
    tokens = ids(11, 9, 5)
    expected = naive_statistics(model, lambda m: losses_of(m, (tokens,)), BLOCKS)
    instrument = PerExample().open(model, request_)
    for sizes in ((3, 5, 1), (1, 5, 3), (9,), (5, 4)):
        model.zero_grad()
        start = 0
        for size in sizes:
            with instrument.micro_batch(size, 1 / 9):
                part(model, tokens, start, size).backward()
            start += size
        assert_close(instrument.finish(9), expected)


def part(model: nn.Module, tokens: Tensor, start: int, size: int) -> Tensor:
    """The share of these examples in the mean loss of 9; targets depend on an example's place in the batch."""
    rows = model(tokens[start : start + size]).flatten(1)
    place = torch.arange(start, start + size).to(rows)[:, None] / 3
    return (rows - torch.linspace(-1, 1, rows.shape[1], dtype=rows.dtype) - place).square().sum() / 9


def sorted_inside(m: nn.Module, x: Tensor) -> Tensor:
    order = x[:, 0, 0].argsort()
    return m.b((m.a(x)[order] + m.t).tanh())[order.argsort()]


NOT_ADDED = [
    Row("in another order", lambda: Composite(sorted_inside, a=Linear(4, 4), b=Linear(4, 2), t=table(5, 4)), SEQUENCE),
    Row(
        "rows and columns added first, as many rows as examples",
        lambda: Composite(
            lambda m, x: m.a(x) + (m.rows + m.columns), a=Linear(4, 4), rows=table(6, 1, 4), columns=table(1, 5, 4)
        ),
        (floats(6, 6, 5, 4),),
    ),
    Row(
        "added in place to a view",
        lambda: Composite(lambda m, x: m.a(x).add_(m.t), a=Linear(4, 4), t=table(5, 4)),
        SEQUENCE,
    ),
    Row(
        "also used otherwise",
        lambda: Composite(lambda m, x: m.a(x) * m.t.exp() + m.t, a=Linear(4, 4), t=table(5, 4)),
        SEQUENCE,
    ),
    Row(
        "behind a layer norm",
        lambda: Composite(
            lambda m, x: m.a(x) + m.n(m.t(torch.arange(5))), a=Linear(4, 4), n=nn.LayerNorm(4), t=nn.Embedding(5, 4)
        ),
        SEQUENCE,
    ),
]


@pytest.mark.filterwarnings("ignore:.*no rule counts")
@REQUESTS
@pytest.mark.parametrize("row", NOT_ADDED, ids=lambda row: row.name)
def test_what_looks_like_it_goes_to_the_fallback(row: Row, request_) -> None:
    instrument = PerExample().open(row.model(), request_)
    for _ in range(4):
        assert_exact(instrument, row.all_losses)
    assert instrument.fallback


STOLEN = {
    "added to the input": lambda m, x: m.b(torch.tanh(x + m.t)),
    "added to the input, a view": lambda m, x: m.b(torch.tanh(x + m.t.squeeze(0))),
    "expanded": lambda m, x: m.b(torch.cat([m.t.expand(len(x), -1, -1), x.tanh()], 1)),
}


@REQUESTS
@pytest.mark.parametrize("function", STOLEN.values(), ids=list(STOLEN))
@pytest.mark.parametrize("sizes", [(1, 1, 4), (1, 5)], ids=str)
def test_what_is_kept_of_one_example_is_not_added_to(function, sizes: tuple[int, ...], request_) -> None:
    """Autograd takes the gradient of a table that met one example for its `.grad`, and adds the next ones to it."""
    torch.manual_seed(4)
    model = Composite(function, b=Linear(4, 3), t=table(1, 5, 4)).double()
    x = SEQUENCE[0]
    expected = naive_statistics(model, lambda m: m(x).flatten(1).square().sum(1), BLOCKS)
    instrument = PerExample().open(model, request_)
    for _ in range(3):
        model.zero_grad()
        for rows in x.split(sizes):
            with instrument.micro_batch(len(rows), 1 / 6):
                (model(rows).square().sum() / 6).backward()
        assert_close(instrument.finish(6), expected)


def test_the_gradient_is_bitwise_what_it_is_without_measuring() -> None:
    for row in ADDED:
        model = row.model()
        twin = copy.deepcopy(model)
        instrument = PerExample(fuse=False).open(model, EVERYTHING)
        for _ in range(4):
            measure_once(instrument, lambda m, row=row: seeded(row, m))
            twin.zero_grad()
            seeded(row, twin).mean().backward()
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad), row.name


class Checkpointed(nn.Module):
    """A table of positions added inside a checkpoint, with dropout."""

    def __init__(self, how: bool | None) -> None:
        super().__init__()
        self.how, self.a, self.b, self.t = how, Linear(4, 4), Linear(4, 2), table(5, 4)

    def segment(self, x: Tensor) -> Tensor:
        return F.dropout(self.a(x) + self.t, 0.4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return self.b(self.segment(x) if self.how is None else checkpoint(self.segment, x, use_reentrant=self.how))


@REQUESTS
def test_inside_a_checkpoint(request_) -> None:
    """Seen where the checkpoint leaves its operations in the graph; refused by name where it hides them."""
    torch.manual_seed(4)
    model, twin = Checkpointed(False).double(), Checkpointed(None).double()
    twin.load_state_dict(model.state_dict())
    row = Row("", Linear, SEQUENCE)
    instrument = PerExample().open(model, request_)
    for _ in range(4):
        assert assert_exact(instrument, lambda m: seeded(row, m), expected_from=twin) == []
    hidden = Checkpointed(True).double()
    instrument = PerExample().open(hidden, request_)
    for _ in range(3):
        with pytest.raises(UncoveredParameter, match="t: no rule"):
            measure_once(instrument, lambda m: seeded(row, m))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_whole_model(reentrant: bool) -> None:
    """Trial runs inside it save tensors of their own, which it must not take for the model's."""
    torch.manual_seed(3)
    model = with_dropout("row").double()
    anchor = torch.zeros((), dtype=torch.float64, requires_grad=True)  # a reentrant checkpoint needs such an input
    instrument = PerExample().open(model, EVERYTHING)
    for _ in range(4):
        torch.manual_seed(5)
        expected = naive_statistics(model, lambda m: losses_of(m, TOKENS), BLOCKS)

        def losses(m: nn.Module) -> Tensor:
            torch.manual_seed(5)
            run = lambda x, zero: losses_of(m, (x,)) + zero  # noqa: E731
            return checkpoint(run, TOKENS[0], anchor, use_reentrant=reentrant)

        statistics, said = measure_once(instrument, losses)
        assert_close(statistics, expected)
        assert said == []


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("case", ["second derivative", "two backwards"])
def test_unusual_backwards_are_refused(case: str, warm: bool) -> None:
    model = Composite(lambda m, x: (x + m.t).tanh(), t=table(5, 4)).double()
    instrument = PerExample().open(model, NORMS)
    for _ in range(3 if warm else 0):
        measure_once(instrument, lambda m: losses_of(m, SEQUENCE))
    model.zero_grad()
    with instrument.micro_batch():
        loss = losses_of(model, SEQUENCE).mean()
        if case == "two backwards":
            (loss / 2).backward(retain_graph=True)
            (loss / 2).backward()
        else:
            (slope,) = torch.autograd.grad(loss, model.t, create_graph=True)
            (loss + slope.square().sum()).backward()
    with pytest.raises(InvalidMeasurement, match="create_graph" if case == "second derivative" else "several backward"):
        instrument.finish()


@REQUESTS
def test_a_path_that_changes_costs_one_measurement_and_is_never_wrong(request_) -> None:
    switch = [0]

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        return y + m.t if switch[0] == 0 else y * m.t if switch[0] == 1 else y

    model = Composite(forward, a=Linear(4, 4), t=table(5, 4)).double()
    instrument = PerExample().open(model, request_)
    failed = []
    for step, path in enumerate([0, 0, 0, 2, 0, 1, 1, 0, 1, 2, 0]):
        switch[0] = path
        try:
            assert_exact(instrument, lambda m: losses_of(m, SEQUENCE))
        except AdadagradError:
            failed.append(step)
    assert failed == [5]
    assert list(instrument.fallback) == ["t"]


@pytest.mark.filterwarnings("ignore:.*no rule counts")
def test_a_penalty_on_the_table_is_not_an_examples_gradient() -> None:
    model = Composite(lambda m, x: m.a(x) + m.t, a=Linear(4, 4), t=table(5, 4)).double()
    instrument = PerExample().open(model, EVERYTHING)
    measure_once(instrument, lambda m: losses_of(m, SEQUENCE))
    for _ in range(2):
        with pytest.raises(AdadagradError):
            measure_once(instrument, lambda m: losses_of(m, SEQUENCE) + m.t.square().sum())


def test_what_was_learnt_is_in_the_state() -> None:
    torch.manual_seed(3)
    model = with_dropout("row").double()
    row = Row("", Linear, TOKENS)
    first, second = PerExample().open(model, EVERYTHING), PerExample().open(model, EVERYTHING)
    for _ in range(3):
        measure_once(first, lambda m: seeded(row, m))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
    forwards = []
    model.up.register_forward_hook(lambda *_: forwards.append(1))
    assert assert_exact(second, lambda m: seeded(row, m)) == []
    assert len(forwards) == 2  # the loop's and the measured one: no trial runs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    model = GPT("row", width=32)
    meter = GradientMeter(model, PerExample(), inner_products=True)
    expected = naive_statistics(model, lambda m: losses_of(m, TOKENS))
    for _ in range(2):
        model.zero_grad()
        with meter:
            with torch.autocast("cpu", dtype):
                values = losses_of(model, TOKENS)
            values.float().mean().backward()
        statistics = meter.statistics()
        assert relative_error(statistics.variance_trace, expected.variance_trace) < 0.02
        assert relative_error(statistics.inner_product_variance, expected.inner_product_variance) < 0.05
