"""Where the examples are: every dimension that is not the batch, though it looks like it, is told apart."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadagrad.core.errors import BatchCoupledModule, InvalidMeasurement, UncoveredParameter
from adadagrad.statistics import GradientMeter, PerExample
from tests.oracles import naive_statistics
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


def two(function) -> nn.Module:
    torch.manual_seed(4)
    return Composite(function, a=Linear(4, 3), b=Linear(3, 2)).double()


def sorted_inside(m: nn.Module, x: Tensor) -> Tensor:
    order = x[:, 0].argsort()
    return m.b(torch.tanh(m.a(x)[order]))[order.argsort()]


def flipped_inside(m: nn.Module, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(x)).flip(0)).flip(0)


X, SEQUENCE = (floats(6, 4),), (floats(6, 5, 4),)
NETWORK = {"a": lambda: Linear(4, 3), "b": lambda: Linear(3, 2)}

ELSEWHERE = [
    Row("examples sorted inside", lambda: two(sorted_inside), X),
    Row("examples flipped inside", lambda: two(flipped_inside), X),
    Row(
        "positions and examples in one dimension",
        lambda: Composite(lambda m, x: m.a(x.reshape(-1, 4)).tanh().reshape(len(x), -1), a=Linear(4, 3)),
        SEQUENCE,
    ),
    Row(
        "examples repeated",
        lambda: Composite(lambda m, x: m.a(x.repeat_interleave(2, 0)).tanh().reshape(len(x), -1), a=Linear(4, 3)),
        X,
    ),
    Row(
        "convolution over the examples, unbatched",
        lambda: Composite(lambda m, x: m.a(x.t()).t(), a=nn.Conv1d(4, 3, 1)),
        X,
    ),
    Row(
        "convolution over the examples",
        lambda: Composite(lambda m, x: m.a(x.t()[None])[0].t(), a=nn.Conv1d(4, 3, 1)),
        X,
    ),
]


@pytest.mark.parametrize("request_", [NORMS, EVERYTHING], ids=["norms", "everything"])
@pytest.mark.parametrize("row", ELSEWHERE, ids=lambda row: row.name)
def test_rows_that_are_not_the_examples_go_to_the_fallback(row: Row, request_) -> None:
    model = row.model()
    instrument = PerExample().open(model, request_)
    for repeat in range(4):
        said = assert_exact(instrument, row.all_losses)
        assert bool(said) == (repeat == 0)


@pytest.mark.filterwarnings("ignore:.*no rule counts")
def test_an_order_that_the_first_batch_does_not_show_is_found_at_the_next_trial_runs() -> None:
    """Examples of equal keys stay where they are; V never depends on the order, inner products do."""
    instrument = PerExample().open(two(sorted_inside), EVERYTHING)
    equal = floats(6, 4)
    equal[:, 0] = 1.0
    for x in (equal, floats(6, 4), floats(6, 4), floats(6, 4)):
        assert_exact(instrument, lambda m, x=x: losses_of(m, (x,)))
    assert sorted(instrument.fallback) == ["b.bias", "b.weight"]


ORDERS = [
    Row(
        "sequence first",
        lambda: Composite(
            lambda m, x: m.b(m.a(x.transpose(0, 1)).tanh()).transpose(0, 1), a=Linear(4, 3), b=nn.LayerNorm(3)
        ),
        SEQUENCE,
    ),
    Row(
        "sequence first, as long as the batch",
        lambda: Composite(
            lambda m, x: m.b(m.a(x.transpose(0, 1)).tanh()).transpose(0, 1), a=Linear(4, 3), b=nn.LayerNorm(3)
        ),
        (floats(5, 5, 4),),
    ),
    Row(
        "tokens of a sequence first",
        lambda: Composite(lambda m, x: m.e(x.t()).tanh().transpose(0, 1), e=nn.Embedding(9, 4)),
        (ids(9, 6, 6),),
    ),
    Row(
        "examples third",
        lambda: Composite(lambda m, x: m.a(x.permute(1, 2, 0, 3)).permute(2, 0, 1, 3), a=Linear(4, 3)),
        (floats(3, 2, 2, 4),),
    ),
    Row(
        "as many positions as examples",
        lambda: Composite(
            lambda m, x: m.e(x) + m.p(torch.arange(x.shape[1])), e=nn.Embedding(9, 4), p=nn.Embedding(6, 4)
        ),
        (ids(9, 6, 6),),
    ),
]


@pytest.mark.parametrize("row", ORDERS, ids=lambda row: row.name)
def test_the_batch_may_be_any_dimension_of_a_layer(row: Row) -> None:
    instrument = PerExample().open(row.model(), EVERYTHING)
    for _ in range(4):
        assert assert_exact(instrument, row.all_losses) == []


def centred(m: nn.Module, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(x - x.mean(0))))


def normalised(m: nn.Module, x: Tensor) -> Tensor:
    return m.b(F.batch_norm(m.a(x), None, None, training=True))


@pytest.mark.parametrize(
    ("coupled", "sizes"),
    [
        (centred, (6, 6, 6)),
        (centred, (1, 1, 1, 6)),
        (centred, (3000,)),
        (normalised, (6, 6, 6)),
        (normalised, (3000,)),
    ],
    ids=["centred-6", "centred-1-then-6", "centred-3000", "normalised-6", "normalised-3000"],
)
def test_a_model_that_mixes_examples_is_refused_each_time(coupled, sizes: tuple[int, ...]) -> None:
    """After one example, where mixing cannot be seen; in 3000, where one example moves the mean by little."""
    instrument = PerExample().open(two(coupled), NORMS)
    for n in sizes:
        if n == 1:
            measure_once(instrument, lambda m: losses_of(m, (floats(1, 4),)))
            continue
        with pytest.raises(BatchCoupledModule, match="depends on the other examples"):
            measure_once(instrument, lambda m, n=n: losses_of(m, (floats(n, 4),)))


def test_mixing_is_seen_where_the_first_rows_are_copies() -> None:
    x = torch.cat([floats(1, 4), floats(1, 4), floats(5, 4)])
    with pytest.raises(BatchCoupledModule):
        measure_once(PerExample().open(two(centred), NORMS), lambda m: losses_of(m, (x,)))


@pytest.mark.filterwarnings("ignore:.*no rule counts")
def test_mixing_inside_a_model_that_returns_its_loss_is_refused() -> None:
    """No output shows it, but a layer's rows change with another example."""
    model = two(lambda m, x: centred(m, x).square().sum(1).mean())
    with pytest.raises(UncoveredParameter, match="without a batch dimension"):
        measure_once(PerExample().open(model, NORMS), lambda m: m(X[0]).reshape(1))


def test_a_model_that_returns_its_loss_is_measured() -> None:
    model = two(lambda m, x: m.b(torch.tanh(m.a(x))).square().sum(1).mean())
    twin = two(lambda m, x: m.b(torch.tanh(m.a(x))).square().sum(1))
    statistics, _ = measure_once(PerExample().open(model, EVERYTHING), lambda m: m(X[0]).reshape(1))
    assert_close(statistics, naive_statistics(twin, lambda m: m(X[0]), BLOCKS))


def test_dictionaries_in_and_out() -> None:
    model = two(lambda m, batch, scale=1.0: {"logits": m.b(m.a(batch["x"]).tanh()) * scale, "kind": "logits"})
    instrument = PerExample().open(model, EVERYTHING)
    for _ in range(4):
        assert_exact(instrument, lambda m: m({"x": X[0]}, scale=2.0)["logits"].square().sum(1))


@pytest.mark.filterwarnings("ignore:.*no rule counts")
def test_an_argument_of_as_many_rows_as_a_later_micro_batch_is_not_taken_for_examples() -> None:
    """Positions (5,) beside a second micro-batch of 5 examples: refused, not attributed to the wrong example."""
    torch.manual_seed(4)
    model = Composite(lambda m, x, at: m.e(x) * m.p(at), e=nn.Embedding(9, 4), p=nn.Embedding(5, 4)).double()
    tokens, positions = ids(9, 9, 5), torch.arange(5)
    meter = GradientMeter(model, PerExample())
    for part in tokens.split((4, 5)):
        with meter.micro_batch(len(part), 1 / 9):
            (model(part, positions).square().sum((1, 2)).sum() / 9).backward()
    with pytest.raises(UncoveredParameter, match=r"p\.weight"):
        meter.statistics()


def test_a_batch_that_is_not_an_argument_is_refused() -> None:
    model = two(lambda m: m.b(m.a(X[0]).tanh()))
    with pytest.raises(InvalidMeasurement, match="first dimension"):
        measure_once(PerExample().open(model, NORMS), lambda m: m().square().sum(1))


def test_the_wrong_number_of_examples_is_refused() -> None:
    model = two(lambda m, x: m.b(m.a(x).tanh()))
    meter = GradientMeter(model, PerExample())
    with meter.micro_batch(num_examples=3):
        losses_of(model, X).mean().backward()
    with pytest.raises(InvalidMeasurement, match="3 examples"):
        meter.statistics()


def test_trial_runs_leave_the_random_numbers_of_python_and_numpy_alone() -> None:
    """A forward that draws depth or a mask from them would otherwise train on another draw when it is measured."""
    numpy = pytest.importorskip("numpy")
    drawn = []

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        drawn.append((random.random(), numpy.random.random()))
        return m.b(m.a(x).tanh())

    random.seed(7)
    numpy.random.seed(7)
    expected = (random.random(), numpy.random.random())
    random.seed(7)
    numpy.random.seed(7)
    measure_once(PerExample().open(two(forward), NORMS), lambda m: losses_of(m, X))
    assert len(drawn) > 1  # trial runs were made
    assert set(drawn) == {expected}


def test_trial_runs_leave_buffers_and_random_numbers_alone() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = Linear(4, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return F.dropout(self.a(x), 0.5)

    model = Noisy().double()
    instrument = PerExample().open(model, NORMS)
    torch.manual_seed(6)
    measure_once(instrument, lambda m: losses_of(m, X))
    measured, after = [p.grad.clone() for p in model.parameters()], torch.rand(3)
    assert model.calls == 1
    model.zero_grad()
    torch.manual_seed(6)
    losses_of(model, X).mean().backward()
    assert torch.equal(torch.rand(3), after)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), measured, strict=True))


def test_trial_runs_use_a_few_examples() -> None:
    """Mixing shows in few, where one example is much of a mean, and their cost does not grow with the batch."""
    model, sizes = two(lambda m, x: m.b(m.a(x).tanh())), []
    model.a.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    measure_once(PerExample().open(model, NORMS), lambda m: losses_of(m, (floats(50, 4),)))
    assert sizes == [5, 5, 6, 50]


def test_without_trial_runs_the_first_dimension_is_the_batch() -> None:
    model = nn.Sequential(Linear(4, 3), nn.Tanh(), Linear(3, 2)).double()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    instrument = PerExample(calibrate=False).open(model, EVERYTHING)
    assert_exact(instrument, lambda m: losses_of(m, X))
    assert len(calls) == 2  # the oracle's and the measured one


@pytest.mark.filterwarnings("ignore:.*no rule counts")
def test_without_trial_runs_a_vector_of_n_features_is_not_a_batch() -> None:
    torch.manual_seed(4)
    model = Composite(lambda m, x: m.a(x) * m.b(m.v), a=Linear(4, 6), b=Linear(6, 6), v=nn.Parameter(torch.ones(6)))
    instrument = PerExample(calibrate=False).open(model.double(), EVERYTHING)
    for _ in range(4):
        assert_exact(instrument, lambda m: losses_of(m, X))
