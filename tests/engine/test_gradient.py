"""What `optimizer.step()` sees is the mean over exactly the planned examples."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

import adadagrad as ada
from tests.engine.cases import Asks, Recording, Sizes, doubling, make_data, make_engine, make_model, put, train

GROWING = Asks(doubling)
MICRO = [1, 2, 3, 7, 16, 64, 256]


def rows_of_steps(engine, decisions):
    """The rows of the data set that each step has trained on, from the order of the stream alone."""
    sizes = [d.observation.global_batch_size for d in decisions]
    order = engine._assembler.source.order
    return [order.indices(stop - size, size) for size, stop in zip(sizes, accumulate(sizes), strict=True)]


def direct_gradient(data, rows, before, weighting=None):
    """The gradient of the (weighted) mean loss over some rows, in one backward."""
    model = put(make_model(), before)
    x, y, _, w = (t[rows] for t in data.tensors)
    losses = F.cross_entropy(model(x), y, reduction="none")
    loss = losses.mean() if weighting is None else (losses * w).sum() / w.sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def weighted_loss(model, form):
    def loss(batch):
        x, y, _, w = batch
        total = (F.cross_entropy(model(x), y, reduction="none") * w).sum()
        return total, (float(w.sum()) if form == "number" else w.sum() if form == "scalar tensor" else w)

    return loss


def worst_error(micro_batch_size, weighting=None, policy=GROWING, measure=None, loss=None, total=401, **options):
    """Largest relative error of any gradient of a whole run."""
    data, model = make_data(), make_model()
    optimizer = Recording(model.parameters())
    options = {"micro_batch_size": micro_batch_size, "measure": measure, "total_samples": total, **options}
    engine = make_engine(model, optimizer, data, policy, **options)
    if weighting is not None and loss is None:
        loss = weighted_loss(model, weighting)
    decisions = train(engine, loss)
    sizes = [d.observation.global_batch_size for d in decisions]
    assert sum(sizes) == total
    assert len(set(sizes)) > 2
    assert sizes[-1] < decisions[-1].plan.global_batch_size  # the last one is short
    errors = []
    for rows, seen, before in zip(rows_of_steps(engine, decisions), optimizer.gradients, optimizer.before, strict=True):
        expected = direct_gradient(data, rows, before, weighting)
        errors.append(float((seen - expected).norm() / expected.norm()))
    return max(errors)


@pytest.mark.parametrize("micro_batch_size", MICRO)
@pytest.mark.parametrize("weighting", [None, "number", "scalar tensor", "rows"])
def test_the_gradient_is_the_mean_over_the_planned_batch(micro_batch_size, weighting):
    assert worst_error(micro_batch_size, weighting, measure=ada.Measure(every=1, max_examples=None)) <= 1e-12


@pytest.mark.parametrize("micro_batch_size", [1, 3, 16, 256])
@pytest.mark.parametrize("max_examples", [2, 5, 20])
@pytest.mark.parametrize("weighting", [None, "rows"])
def test_the_gradient_is_the_mean_with_a_measured_subset(micro_batch_size, max_examples, weighting):
    measure = ada.Measure(every=1, max_examples=max_examples)
    assert worst_error(micro_batch_size, weighting, measure=measure) <= 1e-12


@pytest.mark.parametrize("measure", [None, ada.Measure(estimator=ada.MicroBatch(), every=1), ada.Measure(every=2)])
@pytest.mark.parametrize("weighting", [None, "number", "rows"])
def test_the_gradient_is_the_mean_whatever_is_measured(measure, weighting):
    assert worst_error(7, weighting, measure=measure) <= 1e-12


def test_the_gradient_is_the_mean_under_random_growth_and_shrinkage():
    assert worst_error(5, policy=Sizes(), total=403) <= 1e-12
    assert worst_error(5, "rows", policy=Sizes(seed=1), total=403, epoch_boundary="short") <= 1e-12


def test_the_gradient_is_the_mean_with_the_loop_by_hand():
    data, model = make_data(), make_model()
    optimizer = Recording(model.parameters())
    engine = make_engine(model, optimizer, data, GROWING, micro_batch_size=3)
    decisions = []
    for step in engine:
        for x, y, _, w in step:
            step.backward((F.cross_entropy(model(x), y, reduction="none") * w).sum(), weight=w)
        decisions.append(step.update())
    for rows, seen, before in zip(rows_of_steps(engine, decisions), optimizer.gradients, optimizer.before, strict=True):
        expected = direct_gradient(data, rows, before, "rows")
        assert (seen - expected).norm() <= 1e-12 * expected.norm()


def test_the_mean_of_micro_batch_means_would_fail():
    """The control: this test battery sees the error that it is there to see."""
    data, before = make_data(), [p.detach() for p in make_model().parameters()]
    rows = torch.arange(12)
    expected = direct_gradient(data, rows, before, "rows")
    for micro_batch_size in (1, 2, 3, 5):
        parts = [direct_gradient(data, part, before, "rows") for part in rows.split(micro_batch_size)]
        wrong = torch.stack(parts).mean(0)
        assert (wrong - expected).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize("first", range(1, 9))
@pytest.mark.parametrize("second", range(1, 9))
def test_every_transition_keeps_a_known_gradient(first, second):
    """A loss whose gradient is 1 for every example: 1.8 and 0.4 elsewhere."""
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = Recording(model.parameters(), lr=0.0)
    data = torch.utils.data.TensorDataset(torch.ones(16 * (first + second) + 3, 1))
    policy = ada.StagedBatch({0: 2 * first, 6 * first: 2 * second})
    engine = make_engine(model, optimizer, data, policy, micro_batch_size=2, epochs=1)
    train(engine, lambda batch: model(batch[0]).mean())
    assert len(optimizer.gradients) > 3
    assert max(abs(float(g) - 1) for g in optimizer.gradients) < 1e-6


def run_with(measure, policy=None, dtype=torch.float64, **options):
    model = make_model(dtype=dtype)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
    policy = ada.StagedBatch({0: 4, 100: 30, 300: 9}) if policy is None else policy
    engine = make_engine(model, optimizer, make_data(dtype=dtype), policy, measure=measure, **options)
    decisions = train(engine)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), decisions


@pytest.mark.parametrize("micro_batch_size", [4, 256])
def test_measuring_leaves_the_same_weights_bitwise_where_the_split_is_the_same(micro_batch_size):
    plain, _ = run_with(None, micro_batch_size=micro_batch_size)
    for measure in (ada.Measure(every=1, max_examples=None), ada.Measure(every=3, max_examples=None), ada.Measure()):
        measured, decisions = run_with(measure, micro_batch_size=micro_batch_size)
        assert any(d.observation.gradient is not None for d in decisions)
        assert torch.equal(plain, measured)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_measuring_leaves_the_weights_within_rounding_where_the_split_differs(dtype, bound):
    plain, _ = run_with(None, dtype=dtype)
    for measure in (ada.Measure(every=1, max_examples=3), ada.Measure(estimator=ada.MicroBatch(), every=1)):
        measured, decisions = run_with(measure, dtype=dtype)
        assert all(d.observation.gradient is not None for d in decisions[:-1])
        assert (plain - measured).norm() <= bound * plain.norm()


@pytest.mark.parametrize("weighting", [None, "number"])
def test_the_loss_on_record_is_the_mean_over_the_planned_examples(weighting):
    data, model = make_data(), make_model()
    optimizer = Recording(model.parameters())
    engine = make_engine(model, optimizer, data, ada.ConstantBatch(10), micro_batch_size=3, total_samples=40)
    decisions = train(engine, None if weighting is None else weighted_loss(model, weighting))
    for rows, before, decision in zip(rows_of_steps(engine, decisions), optimizer.before, decisions, strict=True):
        x, y, _, w = (t[rows] for t in data.tensors)
        losses = F.cross_entropy(put(make_model(), before)(x), y, reduction="none")
        expected = losses.mean() if weighting is None else (losses * w).sum() / w.sum()
        assert decision.observation.loss == pytest.approx(float(expected.detach()), rel=1e-12)
