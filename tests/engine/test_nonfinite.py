"""A non-finite loss, gradient or statistic never reaches the parameters or the batch size."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

import adadagrad as ada
from adadagrad.core.errors import NonFiniteGradient
from tests.engine.cases import Asks, Recording, make_data, make_engine, make_model, mean_loss, read_log, train, weights

BAD_STEPS = {3, 4, 7}


class Poisoned(torch.autograd.Function):
    """Identity whose gradient is not finite, while the value is."""

    @staticmethod
    def forward(ctx, x, value):
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        poisoned = gradient.clone()
        poisoned.flatten()[0] = ctx.value
        return poisoned, None


def bad_loss(engine, what, bad=BAD_STEPS, last_only=False):
    """A loss that is bad in some steps, in all micro-batches or in the last one only."""
    model = engine.model

    def loss(batch):
        good = engine.steps + 1 not in bad or (last_only and len(batch[0]) == engine.micro_batch_size)
        if good:
            return F.cross_entropy(model(batch[0]), batch[1])
        if what == "nan loss":
            return F.cross_entropy(model(batch[0]), batch[1]) * math.nan
        if what == "infinite loss":
            return F.cross_entropy(model(batch[0]), batch[1]) + math.inf
        value = math.nan if what == "nan gradient" else math.inf
        return F.cross_entropy(Poisoned.apply(model(batch[0]), value), batch[1])

    return loss


WHAT = ["nan loss", "infinite loss", "nan gradient", "infinite gradient"]


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("measure", [None, ada.Measure(every=1), ada.Measure(estimator=ada.MicroBatch(), every=1)])
def test_skip_leaves_the_step_out(what, last_only, measure, tmp_path):
    model = make_model()
    policy = Asks(lambda o: o.global_batch_size + 3)
    options = {"measure": measure, "micro_batch_size": 3, "global_batch_size": 7, "log_dir": tmp_path}
    engine = make_engine(model, torch.optim.Adagrad(model.parameters(), lr=0.1), policy=policy, **options)
    loss = bad_loss(engine, what, last_only=last_only)
    drawn = seen = 0
    for step in engine:
        before, size = weights(model), engine.global_batch_size
        step.run(loss)
        decision = step.update()
        drawn += step.global_batch_size
        assert all(p.grad is None for p in model.parameters())
        if decision.step in BAD_STEPS:
            assert torch.equal(before, weights(model))
            assert engine.global_batch_size == size == decision.next_plan.global_batch_size
            assert decision.reason == "skipped: non-finite"
            assert (decision.requested, decision.observation.gradient) == (None, None)
        else:
            seen += step.global_batch_size
            assert not torch.equal(before, weights(model))
        assert (engine.samples_seen, engine.samples_drawn) == (seen, drawn) == (decision.samples_seen, drawn)
        assert weights(model).isfinite().all()
    assert engine.skipped == len(BAD_STEPS)
    assert engine.samples_seen == 700 < engine.samples_drawn
    log = read_log(tmp_path)
    assert [line["step"] for line in log if line["kind"] == "skip"] == sorted(BAD_STEPS)
    assert log[-1]["kind"] == "end"
    assert log[-1]["skipped"] == 3
    assert log[-1]["samples_drawn"] - log[-1]["samples_seen"] == sum(
        line["global_batch_size"] for line in log if line["kind"] == "skip"
    )


@pytest.mark.parametrize("estimator", [ada.PerExample(), ada.MicroBatch(units=3)])
def test_a_skipped_step_leaves_nothing_in_the_next_measurement(estimator):
    """The statistics of the step after a skip are those of a run that begins there."""
    data, measure = make_data(), ada.Measure(estimator=estimator, every=1, max_examples=None)
    options = {"measure": measure, "micro_batch_size": 3, "global_batch_size": 9}

    def engine_of(model):
        return make_engine(model, torch.optim.SGD(model.parameters(), lr=0.0), data, Asks(lambda o: 9.0), **options)

    skipping, plain = engine_of(make_model()), engine_of(make_model())
    found = train(skipping, bad_loss(skipping, "nan gradient", last_only=False))
    for now, truth in zip(found[:15], train(plain)[:15], strict=True):
        if now.step not in BAD_STEPS:
            assert now.observation.gradient == truth.observation.gradient


def test_the_examples_of_a_skipped_step_do_not_come_again():
    engine = make_engine(make_model(), policy=ada.StagedBatch({0: 10}), total_samples=200)
    loss, seen = bad_loss(engine, "nan loss"), []
    for step in engine:
        for batch in step:
            seen += batch[2].tolist()
            step.backward(loss(batch))
        step.update()
    assert len(seen) == 230
    assert sorted(seen[:203]) == list(range(203))


@pytest.mark.parametrize("what", WHAT)
def test_stop_raises_before_the_update_and_leaves_a_readable_directory(what, tmp_path):
    model = make_model()
    optimizer = Recording(model.parameters())
    engine = make_engine(model, optimizer, on_nonfinite="stop", log_dir=tmp_path, measure=ada.Measure(every=1))
    with pytest.raises(
        NonFiniteGradient, match=r'step 3 are not both finite: look for NaN.*in the data.*on_nonfinite="skip"'
    ):
        train(engine, bad_loss(engine, what))
    assert len(optimizer.gradients) == 2
    assert weights(model).isfinite().all()
    assert all(p.grad is None for p in model.parameters())
    log = read_log(tmp_path)
    assert [line["kind"] for line in log] == ["start", "step", "step", "skip"]
    assert log[-1]["step"] == 3
    engine.save(tmp_path / "after.pt")  # the state is whole
    again = make_engine(make_model(), log_dir=tmp_path, measure=ada.Measure(every=1))
    again.load(tmp_path / "after.pt")
    train(again)
    assert again.samples_seen == 700


@pytest.mark.parametrize("word", ["nan", "inf", "-inf"])
def test_a_log_with_non_finite_numbers_stays_json(word, tmp_path):
    engine = make_engine(make_model(), policy=ada.StagedBatch({0: 10}), total_samples=60, log_dir=tmp_path)
    loss = mean_loss(engine.model)
    train(engine, lambda batch: loss(batch) + (float(word) if engine.steps == 2 else 0.0))
    engine.log({"val/loss": float(word)})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert records[3]["loss"] == word
    assert records[-1]["metrics"] == {"val/loss": word}


def test_fifty_skips_in_a_row_stop_and_fewer_do_not(tmp_path):
    def engine_with(bad):
        log_dir = tmp_path / str(len(bad))
        engine = make_engine(make_model(), policy=ada.StagedBatch({0: 2}), total_samples=300, log_dir=log_dir)
        return engine, bad_loss(engine, "nan loss", bad)

    engine, loss = engine_with(set(range(5, 54)) | set(range(55, 104)))
    train(engine, loss)
    assert engine.skipped == 98
    engine, loss = engine_with(set(range(5, 1000)))
    with pytest.raises(NonFiniteGradient, match=r"step 54 .*as in the 49 before: look for NaN .*in the data, or start"):
        train(engine, loss)
    assert engine.skipped == 50
    assert engine.samples_seen == 8


class NaNStatistics:
    """An instrument whose statistics are what a test wants, whatever was measured."""

    def __init__(self, inner, **values):
        self._inner, self._values = inner, values

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def finish(self, num_examples=None, weight_sq_sum=None, scale=1.0):
        from dataclasses import replace

        return replace(self._inner.finish(num_examples, weight_sq_sum, scale), **self._values)


@pytest.mark.parametrize(
    ("values", "requested"),
    [
        ({"variance_trace": math.nan}, math.nan),
        ({"grad_norm_sq": math.nan}, math.nan),
        ({"variance_trace": math.inf}, math.inf),
        ({"variance_trace": 0.0, "grad_norm_sq": 0.0}, math.nan),
        ({"grad_norm_sq": 0.0}, math.inf),
        ({"variance_trace": -math.inf}, -math.inf),
    ],
)
@pytest.mark.parametrize("monotone", [True, False])
def test_a_non_finite_statistic_never_changes_the_batch_size(values, requested, monotone, tmp_path):
    bounds = ada.Bounds(monotone=monotone)
    options = {"measure": ada.Measure(every=1), "bounds": bounds, "total_samples": 100, "log_dir": tmp_path}
    engine = make_engine(make_model(), policy=ada.NormTest(), **options)
    engine.measuring.instrument = NaNStatistics(engine.measuring.instrument, **values)
    decisions = train(engine)
    assert {d.plan.global_batch_size for d in decisions} == {4}
    assert {d.next_plan.global_batch_size for d in decisions} == {4}
    assert all(str(d.requested) == str(requested) for d in decisions)
    assert all(d.reason in ("nan: hold", "infinite: hold") for d in decisions)
    lines = [line for line in read_log(tmp_path) if line["kind"] == "step"]
    assert all(line["requested"] == str(requested) for line in lines)
    assert engine.nonfinite_requests == read_log(tmp_path)[-1]["nonfinite_requests"] == len(decisions)


def test_a_policy_that_divides_by_a_gradient_of_zero_has_no_answer_and_holds():
    policy = Asks(lambda observation: 1.0 / 0.0)
    engine = make_engine(make_model(), policy=policy, measure=ada.Measure(every=1), total_samples=40)
    decisions = train(engine)
    assert {d.next_plan.global_batch_size for d in decisions} == {4}
    assert {d.reason for d in decisions} == {"nan: hold"}


@pytest.mark.parametrize("test", [ada.InnerProductTest(), ada.AugmentedInnerProductTest()])
def test_a_nan_inner_product_variance_never_changes_the_batch_size(test):
    engine = make_engine(make_model(), policy=test, measure=ada.Measure(every=1), total_samples=40)
    engine.measuring.instrument = NaNStatistics(engine.measuring.instrument, inner_product_variance=math.nan)
    assert {d.next_plan.global_batch_size for d in train(engine)} == {4}


def test_an_overflowing_statistic_holds_while_the_gradient_is_finite():
    """|g_i|^2 beyond float64 for one example, though the mean gradient is finite."""
    model = torch.nn.Linear(1, 1, bias=False).double()
    x = torch.tensor([[1e200], [-1e200], [1.0], [2.0]], dtype=torch.float64)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x.repeat(10, 1)), shuffle=False)
    engine = make_engine(model, None, loader, measure=ada.Measure(every=1), total_samples=40)
    decisions = train(engine, lambda batch: model(batch[0]).mean())
    assert {d.plan.global_batch_size for d in decisions} == {4}
    assert engine.skipped == 0


@pytest.mark.parametrize(("dtype", "large"), [(torch.float16, 3e4), (torch.bfloat16, 1e38), (torch.float32, 1e30)])
@pytest.mark.parametrize("max_grad_norm", [None, 2.0])
def test_a_finite_gradient_whose_norm_overflows_its_precision_is_applied(dtype, large, max_grad_norm):
    """16 equal elements: float16 holds each of them, but not their norm, and float32 not the sum of squares."""
    model = torch.nn.Linear(16, 1, bias=False).to(dtype)
    torch.nn.init.zeros_(model.weight)
    optimizer = Recording(model.parameters(), lr=0.0)
    data = torch.utils.data.TensorDataset(torch.full((8, 16), large, dtype=dtype))
    engine = make_engine(
        model, optimizer, data, ada.ConstantBatch(4), max_grad_norm=max_grad_norm, total_samples=8, micro_batch_size=4
    )
    train(engine, lambda batch: model(batch[0]).mean())
    assert engine.skipped == 0
    assert len(optimizer.gradients) == 2
    expected = large if max_grad_norm is None else max_grad_norm / 4
    for gradient in optimizer.gradients:
        assert gradient.double().tolist() == pytest.approx([expected] * 16, rel=1e-2)
