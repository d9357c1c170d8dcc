"""What a step's record says equals the definition, at the parameters before the update."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import adadagrad as ada
from adadagrad.core.reduction import CoordinateReduction
from tests.engine.cases import Asks, Recording, doubling, losses_of, make_data, make_engine, make_model, put, train
from tests.engine.test_gradient import rows_of_steps, weighted_loss
from tests.oracles import example_gradients, naive_statistics, relative_error

POLICIES = {
    "norm": ada.NormTest(eta=0.5),
    "inner": ada.InnerProductTest(theta=0.4),
    "augmented": ada.AugmentedInnerProductTest(theta=0.4, nu=0.5),
    "max": ada.CoordinateNormTest(eta=40.0),
    "quantile": ada.CoordinateNormTest(eta=0.8, reduction="quantile", quantile=0.4),
    "blocks": ada.CoordinateNormTest(eta=0.6, reduction="blocks"),
}


def run(policy, measure, micro_batch_size=16, loss=None, total=300, **options):
    """Return (decision, rows, parameters before) of every step of a run."""
    model = make_model()
    optimizer = Recording(model.parameters())
    options = {"measure": measure, "micro_batch_size": micro_batch_size, "total_samples": total, **options}
    engine = make_engine(model, optimizer, make_data(), policy, **options)
    decisions = train(engine, None if loss is None else weighted_loss(model, loss))
    return list(zip(decisions, rows_of_steps(engine, decisions), optimizer.before, strict=True))


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5, 16, 256])
@pytest.mark.parametrize("name", POLICIES)
def test_with_everything_measured_the_record_is_the_naive_loop(name, micro_batch_size):
    policy, data, model = POLICIES[name], make_data(), make_model()
    reduction = policy.coordinate_reduction
    steps = run(policy, ada.Measure(every=1, max_examples=None), micro_batch_size, bounds=ada.Bounds(max_growth=1.5))
    measured = [step for step in steps if step[0].observation.gradient is not None]
    assert len(measured) >= len(steps) - 2
    assert len({step[0].observation.global_batch_size for step in measured}) > 2
    for decision, rows, before in measured:
        g = decision.observation.gradient
        truth = naive_statistics(put(model, before), losses_of(data, rows), reduction)
        assert g.num_examples == g.num_units == len(rows)
        assert g.kind == "per_example"
        assert relative_error(g.grad_norm_sq, truth.grad_norm_sq) < 1e-10
        assert relative_error(g.variance_trace, truth.variance_trace) < 1e-10
        if "inner_product_variance" in policy.needs:
            assert relative_error(g.inner_product_variance, truth.inner_product_variance) < 1e-10
            assert relative_error(g.orthogonal_variance, truth.orthogonal_variance) < 1e-9
        if reduction is not None:
            assert relative_error(g.coordinate_ratio, truth.coordinate_ratio) < 1e-7 * (1 + truth.coordinate_ratio)


def weighted_units(model, data, rows, form, micro_batch_size):
    """Return g_i and c_i, where a number is spread evenly over its micro-batch."""
    x, y, _, w = (t[rows] for t in data.tensors)
    c = w if form == "rows" else torch.cat([part.mean().expand(len(part)) for part in w.split(micro_batch_size)])
    rows_ = example_gradients(model, lambda m: F.cross_entropy(m(x), y, reduction="none") * w / c)
    return rows_, c / c.sum()


@pytest.mark.parametrize("micro_batch_size", [1, 3, 16, 256])
@pytest.mark.parametrize("form", ["number", "rows"])
def test_with_token_weights_the_record_is_the_weighted_formula(form, micro_batch_size):
    data, model = make_data(), make_model()
    policy = ada.AugmentedInnerProductTest(theta=0.4, nu=0.5)
    measure = ada.Measure(every=1, max_examples=None)
    for decision, rows, before in run(policy, measure, micro_batch_size, form, bounds=ada.Bounds(max_growth=2.0)):
        g = decision.observation.gradient
        if g is None:
            continue
        units, c = weighted_units(put(model, before), data, rows, form, micro_batch_size)
        mean = c @ units
        s = float(mean.square().sum())
        v = (float(c @ units.square().sum(1)) - s) / (1 - float(c.square().sum()))
        products = units @ mean
        vp = (float(c @ products.square()) - s**2) / (1 - float(c.square().sum()))
        assert relative_error(g.weight_sq_sum, float(c.square().sum())) < 1e-12
        assert relative_error(g.grad_norm_sq, s) < 1e-10
        assert relative_error(g.variance_trace, v) < 1e-10
        assert relative_error(g.inner_product_variance, vp) < 1e-9
        assert relative_error(g.true_grad_norm_sq, s - v * float(c.square().sum())) < 1e-9


def pooled(units, mean, groups):
    """V and Vp of a measured subset in groups, by the formulas of `adadagrad.statistics.sums`."""
    numerator = inner = freedom = 0.0
    for group in groups:
        part = units[group]
        p = part @ mean
        numerator += float(part.square().sum() - len(part) * part.mean(0).square().sum())
        inner += float(p.square().sum() - len(part) * p.mean().square())
        freedom += len(part) - 1
    return numerator / freedom, inner / freedom


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5, 64])
@pytest.mark.parametrize("max_examples", [2, 3, 8, 11])
def test_a_measured_subset_gives_the_pooled_formula(micro_batch_size, max_examples):
    data, model = make_data(), make_model()
    policy = ada.AugmentedInnerProductTest(theta=0.4, nu=0.5)
    measure = ada.Measure(every=1, max_examples=max_examples)
    subsets = 0
    for decision, rows, before in run(policy, measure, micro_batch_size, bounds=ada.Bounds(max_growth=2.0)):
        g = decision.observation.gradient
        if g is None:
            continue
        units = example_gradients(put(model, before), losses_of(data, rows))
        part = slice(0, min(max_examples, len(rows)))
        v, vp = pooled(units, units.mean(0), [part])
        subsets += max_examples < len(rows)
        assert g.num_units == min(max_examples, len(rows))
        assert g.num_examples == len(rows)
        assert relative_error(g.grad_norm_sq, float(units.mean(0).square().sum())) < 1e-10
        assert relative_error(g.variance_trace, v) < 1e-10
        assert relative_error(g.inner_product_variance, vp) < 1e-9
    assert subsets > 2


def test_a_measured_subset_with_weights_gives_the_weighted_formula_on_it():
    data, model = make_data(), make_model()
    measure = ada.Measure(every=1, max_examples=6)
    policy = ada.AugmentedInnerProductTest(theta=0.4, nu=0.5)
    for decision, rows, before in run(policy, measure, 4, "rows", bounds=ada.Bounds(max_growth=2.0)):
        g = decision.observation.gradient
        if g is None or len(rows) <= 6:
            continue
        units, c = weighted_units(put(model, before), data, rows, "rows", 4)
        mean = c @ units
        units, w = units[:6], c[:6] / c[:6].sum()
        products = units @ mean
        freedom = 1 - float(w.square().sum())
        v = float(w @ units.square().sum(1) - (w @ units).square().sum()) / freedom
        vp = float(w @ products.square() - (w @ products).square()) / freedom
        assert relative_error(g.weight_sq_sum, float(c.square().sum())) < 1e-12
        assert relative_error(g.variance_trace, v) < 1e-10
        assert relative_error(g.inner_product_variance, vp) < 1e-9


def test_a_coordinate_ratio_of_a_subset_has_the_subsets_variances_and_the_whole_gradient():
    data, model = make_data(), make_model()
    policy = ada.CoordinateNormTest(eta=0.8, reduction="quantile", quantile=0.4)
    measure = ada.Measure(every=1, max_examples=6)
    for decision, rows, before in run(policy, measure, 4, bounds=ada.Bounds(max_growth=2.0)):
        g = decision.observation.gradient
        if g is None:
            continue
        units = example_gradients(put(model, before), losses_of(data, rows))
        ratios = (units[:6].var(0) / units.mean(0).square()).sort().values
        expected = float(ratios[math.ceil(0.4 * len(ratios) - 1e-9) - 1])
        assert relative_error(g.coordinate_ratio, expected) < 1e-8


def test_the_weighted_ratio_reads_the_second_moment_before_the_update():
    data, reference = make_data(), make_model()
    model = make_model()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
    policy = ada.CoordinateNormTest(eta=0.5, reduction="weighted")
    measure = ada.Measure(every=1, max_examples=None)
    bounds = ada.Bounds(max_growth=1.5)
    engine = make_engine(model, optimizer, data, policy, measure=measure, bounds=bounds, total_samples=200)
    position, before, moments, checked = 0, None, None, 0
    for step in engine:
        rows = engine._assembler.source.order.indices(position, step.global_batch_size)
        position += len(rows)
        before = [p.detach().clone() for p in model.parameters()]
        moments = torch.cat([optimizer.state[p]["sum"].flatten().clone() for p in model.parameters()])
        step.run(lambda batch: F.cross_entropy(model(batch[0]), batch[1]))
        decision = step.update()
        if decision.observation.gradient is None:
            continue
        units = example_gradients(put(reference, before), losses_of(data, rows))
        w = torch.where(moments > 0, moments, math.inf).rsqrt()
        noise, signal = float(w @ units.var(0)), float(w @ units.mean(0).square())
        if signal > 0:
            checked += 1
            assert relative_error(decision.observation.gradient.coordinate_ratio, noise / signal) < 1e-9
            assert decision.requested == pytest.approx(noise / signal / 0.25, rel=1e-9)
    assert checked > 5


@pytest.mark.parametrize("estimator", ["per example", "micro-batch"])
def test_a_subset_is_unbiased(estimator):
    """Over many seeds the mean of V of the first step is the variance over the data set, within 4 standard errors."""
    data, model = make_data(), make_model()
    truth = example_gradients(model, losses_of(data, torch.arange(len(data)))).var(0).sum()
    before = [p.detach().clone() for p in model.parameters()]
    chosen = "auto" if estimator == "per example" else ada.MicroBatch(units=5)
    measure = ada.Measure(estimator=chosen, every=1, max_examples=5)
    values = []
    for seed in range(200):
        engine = make_engine(put(model, before), None, data, measure=measure, global_batch_size=17, seed=seed)
        values.append(train(engine, steps=1)[0].observation.gradient.variance_trace)
    values = torch.tensor(values, dtype=torch.float64)
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - truth) < 4 * error
    assert error < 0.05 * truth


def test_micro_batch_units_are_weighted_by_their_size():
    data, model = make_data(), make_model()
    measure = ada.Measure(estimator=ada.MicroBatch(units=4), every=1)
    checked = 0
    for decision, rows, before in run(Asks(doubling), measure, 5, total=300):
        g = decision.observation.gradient
        if g is None:
            continue
        units = example_gradients(put(model, before), losses_of(data, rows))
        count = max(min(4, len(rows) // 2), -(-len(rows) // 5))
        parts = units.tensor_split(count)
        v = sum(len(p) * float((p.mean(0) - units.mean(0)).square().sum()) for p in parts) / (count - 1)
        assert (g.kind, g.num_units, g.num_examples) == ("micro_batch", count, len(rows))
        assert relative_error(g.variance_trace, v) < 1e-10
        checked += 1
    assert checked > 4


@pytest.mark.parametrize("policy", [ada.StagedBatch({0: 17, 40: 33, 80: 49}), Asks(lambda o: 17.0)])
def test_batch_norm_never_meets_a_rest_of_one_example(policy):
    """17 examples in micro-batches of at most 16 are 9 and 8, measured or not: BatchNorm refuses a single one."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3)).double()
    options = {"measure": ada.Measure(every=3), "total_samples": 17 * 12} if policy.needs else {"total_samples": 200}
    start = 17 if policy.needs else None
    engine = make_engine(model, policy=policy, global_batch_size=start, micro_batch_size=16, **options)
    for step in engine:
        assert max(step.split.sizes) - min(step.split.sizes) <= 1
        assert len(step.split.sizes) == -(-step.global_batch_size // 16) or step.measured
        step.run(lambda batch: F.cross_entropy(model(batch[0]), batch[1]))
        step.update()


def test_measuring_happens_as_often_as_asked():
    decisions = [d for d, _, _ in run(Asks(lambda o: 10.0), ada.Measure(every=4), total=204)]
    measured = [d.step for d in decisions if d.observation.gradient is not None]
    assert measured == list(range(1, 22, 4))
    assert {d.reason for d in decisions if d.step not in measured} == {"not measured"}


def test_a_monotone_test_at_its_cap_is_not_measured_any_more():
    decisions = [d for d, _, _ in run(ada.NormTest(eta=0.01), ada.Measure(every=1), max_batch_size=20, total=200)]
    sizes = [d.observation.global_batch_size for d in decisions]
    assert set(sizes[1:-1]) == {20}
    assert [d.observation.gradient is not None for d in decisions] == [True] + [False] * (len(sizes) - 1)


@pytest.mark.parametrize(
    ("bounds", "wasted"),
    [
        (ada.Bounds(multiple_of=8), True),  # 16 is the largest multiple below the cap of 20
        (ada.Bounds(multiple_of=8, monotone=False), False),  # it may shrink again, so it must be looked at
    ],
)
def test_at_its_cap_a_test_is_measured_only_where_it_may_still_change(bounds, wasted):
    options = {"bounds": bounds, "max_batch_size": 20, "global_batch_size": 8, "total": 200}
    decisions = [d for d, _, _ in run(ada.NormTest(eta=0.01), ada.Measure(every=1), **options)]
    assert [d.plan.global_batch_size for d in decisions] == [8] + [16] * 12
    assert [d.observation.gradient is not None for d in decisions] == [True] + [not wasted] * 12


@pytest.mark.parametrize("estimator", ["auto", ada.MicroBatch(units=2)])
def test_a_batch_too_small_to_measure_is_trained_on_all_the_same(estimator):
    """One example has no variance, and three make no two micro-batches of two."""
    sizes = ada.StagedBatch({0: 1, 5: 3, 20: 8})
    decisions = [d for d, _, _ in run(sizes, ada.Measure(estimator=estimator, every=1), total=60)]
    smallest = 2 if estimator == "auto" else 4
    for d in decisions:
        assert (d.observation.gradient is not None) == (d.observation.global_batch_size >= smallest)


def test_a_schedule_that_needs_nothing_measures_nothing_unless_asked():
    policy = ada.StagedBatch({0: 4, 48: 10})
    assert all(d.observation.gradient is None for d, _, _ in run(policy, None, total=98))
    assert all(d.observation.gradient is not None for d, _, _ in run(policy, ada.Measure(every=1), total=98))


@pytest.mark.parametrize("kind", ["max", "quantile", "blocks"])
def test_the_request_reaches_the_measurement(kind):
    quantile = 0.5 if kind == "quantile" else None
    policy = ada.CoordinateNormTest(eta=1.0, reduction=kind, quantile=quantile)
    assert policy.coordinate_reduction == CoordinateReduction(kind=kind, quantile=quantile)
    steps = run(policy, ada.Measure(every=1), total=100)
    assert steps[0][0].requested == pytest.approx(steps[0][0].observation.gradient.coordinate_ratio)
