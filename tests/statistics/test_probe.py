"""`Probe`: unbiased where it sketches, exact elsewhere, as sure as it says, repeatable; training does not notice."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adadagrad as ada
from adadagrad.core.comm import all_ranks
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.records import GradientStatistics
from adadagrad.statistics import PerExample, Probe
from adadagrad.statistics.rules.sketched import SketchedRule
from adadagrad.statistics.sketches import Sketches
from tests.oracles import example_gradients, naive_statistics, relative_error
from tests.ranks import on_two_ranks
from tests.statistics.cases import CASES, GPT, Case, losses
from tests.statistics.checking import EVERYTHING, FIELDS, NORMS, Composite, floats, ids, losses_of, measure_once

DRAWS = 1000 if os.environ.get("ADADAGRAD_SLOW") else 100


class Block(nn.Module):
    """A block like GPT's with a head of its own, wide enough for its layers to be sketched."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = GPT("parameter", vocabulary=13, width=12, length=9), nn.Linear(13, 14)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(12, 14), nn.ReLU(inplace=True), nn.Linear(14, 10)), (floats(7, 9, 12),)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(10, 12, 3, padding=1), nn.ReLU(inplace=True)), (floats(6, 10, 8),)),
    "conv2d, groups, dilation": (
        lambda: nn.Sequential(nn.Conv2d(8, 14, 3, (2, 1), 1, (1, 2), groups=2), nn.Tanh()),
        (floats(5, 8, 9, 7),),
    ),
    "gpt": (Block, (ids(13, 6, 9),)),
}


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(3)
    model, args = MODELS[name]
    return model().double(), args


def draws(model: nn.Module, args: tuple[Tensor, ...], number: int, **options: int) -> list[GradientStatistics]:
    """Measure one batch many times; every measured step has signs of its own."""
    instrument = Probe(**options).open(model, NORMS)
    return [measure_once(instrument, lambda m: losses_of(m, args))[0] for _ in range(number)]


@pytest.mark.parametrize("name", MODELS)
def test_unbiased_and_as_sure_as_it_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many draws of signs: the mean of V, and the mean of the squared error that the probes claim."""
    model, args = build(name)
    claimed, error = [], Sketches.error
    monkeypatch.setattr(Sketches, "error", lambda self, *c: claimed.append(error(self, *c)) or claimed[-1])
    exact = naive_statistics(model, lambda m: losses_of(m, args))
    found = draws(model, args, DRAWS)
    values = torch.tensor([s.variance_trace for s in found], dtype=torch.float64)
    assert values.std() > 0.1 * exact.variance_trace
    assert abs(values.mean() - exact.variance_trace) < 4 * values.std() / math.sqrt(DRAWS)
    squares = torch.tensor(claimed, dtype=torch.float64).square().mean() / (1 - 1 / len(args[0])) ** 2
    assert 0.7 < squares / (values - exact.variance_trace).square().mean() < 1.4
    assert all(s.variance_trace_error > e for s, e in zip(found, claimed, strict=True))
    assert all(relative_error(s.grad_norm_sq, exact.grad_norm_sq) < 1e-10 for s in found)
    assert {s.kind for s in found} == {"probe"}


@pytest.mark.parametrize("probes", [2, 8])
def test_more_probes_are_surer(probes: int) -> None:
    """The squared error falls as 1 / k."""
    torch.manual_seed(3)
    model, x = nn.Sequential(nn.Linear(40, 30), nn.Tanh()).double(), floats(5, 9, 40)
    exact = naive_statistics(model, lambda m: losses_of(m, (x,))).variance_trace
    few, many = (
        torch.tensor([s.variance_trace - exact for s in draws(model, (x,), DRAWS, probes=k)]).square().mean()
        for k in (1, probes)
    )
    assert 0.6 * probes < few / many < 1.7 * probes


def test_the_error_of_one_layer_by_the_formula() -> None:
    """e^2 from the matrices: of every example's gradient less the mean, 2 (|M|_F^2 - sum M_jj^2) / k over all signs."""
    torch.manual_seed(3)
    model, x = nn.Linear(12, 14, bias=False).double(), floats(7, 9, 12)
    rows = example_gradients(model, lambda m: losses_of(m, (x,))).view(7, 14, 12)
    centred = rows - rows.mean(0)
    gram = (centred.mT @ centred).sum(0) / 6  # V is its trace; a probe says w^T gram w
    variance = 2 * (gram.square().sum() - gram.diagonal().square().sum()) / 4
    found = draws(model, (x,), 3 * DRAWS)
    values = torch.tensor([s.variance_trace for s in found], dtype=torch.float64)
    assert float(gram.trace()) == pytest.approx(naive_statistics(model, lambda m: losses_of(m, (x,))).variance_trace)
    assert float(values.var()) == pytest.approx(float(variance), rel=0.35)


def test_the_standard_error_covers() -> None:
    """Where all |g_i| are equal the examples add no error of their own, and V is within one error in 68 % or so."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 14, bias=False), nn.Linear(14, 15, bias=False), nn.Linear(15, 12, bias=False))
    model = model.double()
    x = floats(1, 9, 12)
    x = torch.cat([x, -x, x, -x])
    direction = floats(9, 12)
    instrument = Probe().open(model, NORMS)
    sure = lambda m: (m(x) * direction).sum((1, 2))  # linear in x: g_i = +- the same  # noqa: E731
    exact = naive_statistics(model, sure).variance_trace
    number = 2 * DRAWS
    found = [measure_once(instrument, sure)[0] for _ in range(number)]
    within = sum(abs(s.variance_trace - exact) <= s.variance_trace_error for s in found) / number
    assert 0.54 < within < 0.80
    twice = sum(abs(s.variance_trace - exact) <= 2 * s.variance_trace_error for s in found) / number
    assert twice > 0.85


def test_errors_of_signal_cancel() -> None:
    """Where all examples are nearly alike, V is far below |g|^2, and its error is a share of V, not of |g|^2."""
    torch.manual_seed(3)
    model = nn.Linear(12, 14).double()
    x = floats(1, 9, 12) + 1e-4 * floats(7, 9, 12)
    same = lambda m: m(x).square().sum((1, 2))  # noqa: E731
    exact = naive_statistics(model, same)
    assert exact.variance_trace < 1e-6 * exact.grad_norm_sq
    instrument = Probe().open(model, NORMS)
    for _ in range(20):
        assert 0.2 < measure_once(instrument, same)[0].variance_trace / exact.variance_trace < 3


SKETCHED = {"linear, sequence, gram", "cnn", "residual"}
"""Rows with a layer that is large enough; so have those of GPT."""


def small(case: Case) -> bool:
    return not (case.name in SKETCHED or case.name.startswith("gpt") or case.draws)


@pytest.mark.filterwarnings("ignore:.*no rule counts")
@pytest.mark.parametrize("case", [case for case in CASES if small(case)], ids=lambda case: case.name)
def test_exact_where_nothing_is_sketched(case: Case) -> None:
    torch.manual_seed(3)
    model, x = case.build().double(), case.data(5)
    expected = naive_statistics(model, lambda m: losses(m, x))
    instrument = Probe().open(model, NORMS)
    for _ in range(4):
        found = measure_once(instrument, lambda m: losses(m, x))[0]
        assert relative_error(found.variance_trace, expected.variance_trace) < 1e-10
    exact = measure_once(PerExample(fuse=False).open(model, NORMS), lambda m: losses(m, x))[0]
    assert relative_error(found.variance_trace_error, exact.variance_trace_error) < 1e-8


@pytest.mark.parametrize("name", MODELS)
def test_products_and_coordinates_are_exact(name: str) -> None:
    model, args = build(name)
    expected = measure_once(PerExample().open(model, EVERYTHING), lambda m: losses_of(m, args))[0]
    found = measure_once(Probe().open(model, EVERYTHING), lambda m: losses_of(m, args))[0]
    for field in FIELDS:
        wrong = relative_error(getattr(found, field), getattr(expected, field))
        assert (wrong > 1e-4) if field == "variance_trace" else (wrong < 1e-10), field


def test_a_tied_embedding_is_exact_beside_sketched_layers() -> None:
    """Embedding and head share a weight: its gradients add before they are squared, also under a probe."""
    torch.manual_seed(3)
    model = GPT("parameter", vocabulary=13, width=12, length=9).double()
    x = ids(13, 6, 9)
    for p in (model.attention.qkv, model.attention.out, model.up, model.down):
        p.requires_grad_(False)
    exact = naive_statistics(model, lambda m: losses_of(m, (x,))).variance_trace
    found = measure_once(Probe().open(model, NORMS), lambda m: losses_of(m, (x,)))[0]
    assert relative_error(found.variance_trace, exact) < 1e-10
    model.requires_grad_(True)
    exact = naive_statistics(model, lambda m: losses_of(m, (x,))).variance_trace
    values = torch.tensor([s.variance_trace for s in draws(model, (x,), DRAWS)], dtype=torch.float64)
    assert abs(values.mean() - exact) < 4 * values.std() / math.sqrt(DRAWS)


def alike(model: nn.Module, x: Tensor) -> Tensor:
    """Losses that do not depend on where an example stands."""
    return model(x).square().sum((1, 2))


@pytest.mark.parametrize("sizes", [(4, 3), (1, 2, 4)], ids=str)
def test_any_split_into_micro_batches_gives_the_same_numbers(sizes: tuple[int, ...]) -> None:
    """The signs are the step's, and gradients scaled after the backward are no others."""
    model, (x,) = build("linear")
    found = []
    for split, scale in (((7,), 1.0), (sizes, 1.0), (sizes, 0.5)):
        instrument = Probe().open(model, NORMS)
        model.zero_grad()
        for part in x.split(list(split)):
            with instrument.micro_batch(coefficients=1 / (7 * scale)):
                (alike(model, part).sum() / (7 * scale)).backward()
        for p in model.parameters():
            p.grad *= scale
        found.append(instrument.finish(7, scale=scale))
    for field in ("variance_trace", "variance_trace_error", "grad_norm_sq"):
        assert max(relative_error(getattr(s, field), getattr(found[0], field)) for s in found) < 1e-10


def test_a_part_of_a_step_and_rows_without_weight() -> None:
    """The part's own examples and gradient are sketched: what follows, and a row of weight 0, change nothing."""
    model, (x,) = build("linear")
    whole, first = Probe().open(model, NORMS), Probe().open(model, NORMS)
    model.zero_grad()
    with whole.micro_batch():
        alike(model, x[:5]).mean().backward()
    alone = whole.finish()
    model.zero_grad()
    weights = torch.tensor([0.1] * 5 + [0.0], dtype=torch.float64)
    with first.micro_batch(coefficients=weights):
        (alike(model, x[:6]) @ weights).backward()
    first.close_group()
    (alike(model, x[5:]).sum() * 0.1).backward()
    part = first.finish(7)
    assert relative_error(part.variance_trace, alone.variance_trace) < 1e-10
    assert relative_error(part.variance_trace_error, alone.variance_trace_error) < 1e-10
    assert relative_error(part.grad_norm_sq, alone.grad_norm_sq) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_random_numbers_are_left_alone(name: str) -> None:
    """Bit for bit, with dropout in the model, at steps that verify and at steps that do not."""
    model, args = build(name)
    model = nn.Sequential(nn.Dropout(0.0), model, nn.Dropout(0.4)) if args[0].is_floating_point() else model
    instrument = Probe().open(model, NORMS)
    for _ in range(5):
        model.zero_grad()
        torch.manual_seed(7)
        plain = losses_of(model, args).mean()
        plain.backward()
        gradients, after = [p.grad for p in model.parameters()], torch.rand(3)
        model.zero_grad()
        torch.manual_seed(7)
        with instrument.micro_batch():
            loss = losses_of(model, args).mean()
            loss.backward()
        assert torch.equal(torch.rand(3), after)
        assert torch.equal(loss, plain)
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
        assert instrument.finish().variance_trace > 0


def test_a_seed_repeats_and_another_one_differs() -> None:
    model, args = build("gpt")
    first, again = draws(model, args, 5), draws(model, args, 5)
    assert first == again
    assert len({s.variance_trace for s in first}) == 5  # every step has signs of its own
    other = draws(model, args, 5, seed=1)
    assert {s.variance_trace for s in first}.isdisjoint(s.variance_trace for s in other)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_repeats_the_sketch(reentrant: bool) -> None:
    torch.manual_seed(3)
    a, b = nn.Linear(12, 14), nn.Sequential(nn.Linear(14, 13), nn.Tanh(), nn.Linear(13, 12))
    plain = Composite(lambda m, x: m.b(m.a(x)), a=a, b=b).double()
    saving = Composite(lambda m, x: checkpoint(m.b, m.a(x), use_reentrant=reentrant), a=a, b=b).double()
    x = floats(6, 9, 12)
    for mine, theirs in zip(draws(saving, (x,), 5), draws(plain, (x,), 5), strict=True):
        assert relative_error(mine.variance_trace, theirs.variance_trace) < 1e-12
        assert relative_error(mine.variance_trace_error, theirs.variance_trace_error) < 1e-10


def test_a_resumed_run_repeats() -> None:
    model, args = build("conv1d")
    one = lambda m: losses_of(m, args)  # noqa: E731
    first, second, fresh = (Probe().open(model, NORMS) for _ in range(3))
    for _ in range(3):
        measure_once(first, one)
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        assert measure_once(second, one) == (expected := measure_once(first, one))
        assert measure_once(fresh, one) != expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_right_within_its_precision(dtype: torch.dtype) -> None:
    model, args = build("linear")
    wide = Probe().open(model, NORMS)
    half = Probe().open(copy.deepcopy(model).to(dtype), NORMS)
    found = measure_once(half, lambda m: losses_of(m, (args[0].to(dtype),)) / 64)[0]
    expected = measure_once(wide, lambda m: losses_of(m, args) / 64)[0]
    assert relative_error(found.variance_trace, expected.variance_trace) < 0.05


def test_one_probe_cannot_say_how_sure_it_is() -> None:
    model, args = build("linear")
    assert draws(model, args, 1, probes=1)[0].variance_trace_error is None
    assert draws(model, args, 1, probes=2)[0].variance_trace_error > 0
    for probes, message in ((0, "must be >= 1, got 0"), (2.5, "must be an integer, got 2.5")):
        with pytest.raises(InvalidArgument, match=f"probes {message}"):
            Probe(probes=probes)
    with pytest.raises(InvalidArgument, match="seed must be an integer, got None"):
        Probe(seed=None)


def test_a_failing_sketch_leaves_the_gradient_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise MemoryError

    model, args = build("linear")
    losses_of(model, args).mean().backward()
    plain = [p.grad for p in model.parameters()]
    model.zero_grad()
    instrument = Probe().open(model, NORMS)
    monkeypatch.setattr(SketchedRule, "square_norms", fail)
    with instrument.micro_batch():
        losses_of(model, args).mean().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))
    with pytest.raises(ada.core.errors.InvalidMeasurement, match="MemoryError"):
        instrument.finish()


SPLITS = ((slice(0, 2), slice(2, 3)), (slice(3, 7),))


def on_rank(rank: int | None) -> dict[str, Any]:
    """One step whose examples are split over two ranks; gradients summed by hand."""
    model, (x,) = build("linear")
    instrument = Probe().open(model, dataclasses.replace(NORMS, ranks=all_ranks()))
    parts = SPLITS[rank] if rank is not None else [part for split in SPLITS for part in split]
    for part in parts:
        with instrument.micro_batch(coefficients=1 / 7):
            (alike(model, x[part]).sum() / 7).backward()
    if rank is not None:
        for p in model.parameters():
            dist.all_reduce(p.grad)
    return dataclasses.asdict(instrument.finish())


def test_two_ranks_agree_with_one_process_without_a_word_about_signs() -> None:
    first, second = on_two_ranks(on_rank)
    alone = on_rank(None)
    assert first == second
    for field in ("grad_norm_sq", "variance_trace", "variance_trace_error", "num_units"):
        assert first[field] == pytest.approx(alone[field], rel=1e-10), field


def test_autocast_is_right_within_its_precision() -> None:
    model, (x,) = build("linear")
    found = []
    for on in (False, True):
        instrument = Probe().open(copy.deepcopy(model).float(), NORMS)
        with instrument.micro_batch(), torch.autocast("cpu", torch.bfloat16, enabled=on):
            alike(instrument.model, x.float()).mean().backward()
        found.append(instrument.finish().variance_trace)
    assert relative_error(*found) < 0.05


def test_the_engine_trains_with_it() -> None:
    model, _ = build("linear")
    data = torch.utils.data.TensorDataset(floats(64, 9, 12), floats(64, 9, 10))
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)
    measure = ada.Measure(estimator=ada.Probe(), every=1, max_examples=8)
    engine = ada.AdaptiveBatch(
        model, optimizer, data, ada.NormTest(), global_batch_size=16, total_samples=64, measure=measure
    )
    kinds = []
    for step in engine:
        step.run(lambda batch: (model(batch[0]) - batch[1]).square().mean())
        kinds.append((g := step.update().observation.gradient) and (g.kind, g.num_units))
    assert kinds[0] == ("probe", 8)


def of_other_lengths(rank: int | None) -> dict[str, Any]:
    """One step whose examples are short on one rank, where exact norms cost less than sketches, and long elsewhere."""
    model, (x,) = build("linear")
    instrument = Probe().open(model, dataclasses.replace(NORMS, ranks=all_ranks()))
    for part in (x[:3, :3], x[3:]) if rank is None else ((x[:3, :3], x[3:])[rank],):
        with instrument.micro_batch(coefficients=1 / 7):
            (alike(model, part).sum() / 7).backward()
    if rank is not None:
        for p in model.parameters():
            dist.all_reduce(p.grad)
    return dataclasses.asdict(instrument.finish())


def test_a_layer_that_one_rank_sketches_and_another_does_not() -> None:
    first, second = on_two_ranks(of_other_lengths)
    alone = of_other_lengths(None)
    assert first == second
    for field in ("grad_norm_sq", "variance_trace", "variance_trace_error", "num_units"):
        assert first[field] == pytest.approx(alone[field], rel=1e-10), field
