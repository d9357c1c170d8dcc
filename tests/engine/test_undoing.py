"""A step that fails before its update is undone, whole and at once: nothing counted, nothing left, nothing lost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import adadagrad as ada
from adadagrad.core.errors import BatchCoupledModule, InvalidArgument, StepError
from tests.engine.cases import make_data, make_engine, make_model, mean_loss, patched, read_log, train, weights

EVERY = ada.Measure(every=1)


class Centred(nn.Module):
    """Mixes the examples of a batch by hand, which only a measurement can find out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.layer = nn.Linear(5, 3).double()

    def forward(self, x):
        y = self.layer(x)
        return y - y.mean(0)


class Failing(torch.optim.SGD):
    """An optimizer that refuses its third update."""

    calls = 0

    def step(self, closure=None):
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("the update failed")
        super().step()


def rows_of(engine, step):
    """Run a step by hand and return its rows of the data set."""
    rows = []
    for batch in step:
        rows += batch[2].tolist()
        step.backward(mean_loss(engine.model)(batch))
    return rows


CANNOT_BE_MEASURED = {
    "explicit estimator": (
        {"measure": ada.Measure(estimator=ada.PerExample(), every=1)},
        BatchCoupledModule,
        r"MicroBatch\(\)",
    ),
    "replaced estimator": (
        {"measure": EVERY, "global_batch_size": 3},
        InvalidArgument,
        r"global_batch_size must be >= 4 for MicroBatch",
    ),
}


@pytest.mark.filterwarnings("ignore:measuring with MicroBatch:UserWarning")
@pytest.mark.parametrize("name", CANNOT_BE_MEASURED)
def test_a_measurement_that_cannot_be_made_is_an_error_that_undoes_its_step(name, tmp_path):
    options, error, message = CANNOT_BE_MEASURED[name]
    model = Centred()
    engine = make_engine(model, torch.optim.Adagrad(model.parameters(), lr=0.1), log_dir=tmp_path, **options)
    before = weights(model)
    for _ in range(2):  # it is the same error however often it is tried
        iterator = iter(engine)
        step = next(iterator)
        rows = rows_of(engine, step)
        with pytest.raises(error, match=message):
            step.update()
        assert all(p.grad is None for p in model.parameters())
        assert torch.equal(before, weights(model))
        assert not patched(model)
        assert (engine.steps, engine.samples_seen, engine.samples_drawn, engine.seconds) == (0, 0, 0, 0.0)
        assert rows == engine._assembler.source.order.indices(0, step.global_batch_size).tolist()
        with pytest.raises(StepError, match="this step is undone"):
            step.update()
        with pytest.raises(StepError, match="the update of this step failed, and the step was undone"):
            next(iterator)
    assert [line["kind"] for line in read_log(tmp_path)] == ["start"]


def test_a_run_goes_on_after_an_update_that_failed_as_if_it_had_not():
    def engine_with(optimizer):
        model = make_model()
        return make_engine(model, optimizer(model.parameters(), lr=0.1), measure=EVERY, total_samples=203)

    broken, whole = engine_with(Failing), engine_with(torch.optim.SGD)
    with pytest.raises(RuntimeError, match="the update failed"):
        train(broken)
    assert (broken.steps, broken.optimizer.calls) == (2, 3)
    assert all(p.grad is None for p in broken.model.parameters())
    train(broken)
    train(whole)
    assert torch.equal(weights(broken.model), weights(whole.model))
    assert (broken.steps, broken.samples_drawn) == (whole.steps, whole.samples_drawn) == (whole.steps, 203)


@pytest.mark.parametrize("ran", [True, False])
def test_a_step_whose_loop_was_left_cannot_be_run_or_updated(ran):
    """Its gradient is gone: an update would count examples that were never trained on."""
    engine = make_engine(make_model())
    for step in engine:
        if ran:
            step.run(mean_loss(engine.model))
        break
    with pytest.raises(StepError, match="this step is undone, because its loop was left"):
        step.update()
    with pytest.raises(StepError, match="this step is undone"):
        step.run(mean_loss(engine.model))
    assert (engine.steps, engine.samples_seen) == (0, 0)
    assert train(engine)[-1].samples_seen == 700


def test_a_loop_over_micro_batches_that_is_held_on_to_is_left_with_its_step(tmp_path):
    """A progress bar or a traceback may hold it: what is saved and evaluated afterwards are the true parameters."""
    model = make_model()
    optimizer = ada.ExtrapolatedSGD(model.parameters(), lr=0.05, extrapolation=2.0)
    engine = make_engine(model, optimizer, measure=EVERY, micro_batch_size=2)
    train(engine, steps=3)
    before = weights(model)
    for step in engine:
        held = iter(step)
        next(held)
        assert not torch.equal(weights(model), before)
        assert patched(model)
        with pytest.raises(StepError, match="a step can be iterated once"):
            iter(step)
        break
    assert torch.equal(weights(model), before)
    assert not patched(model)
    engine.save(tmp_path / "run.pt")
    engine.load(tmp_path / "run.pt")
    assert torch.equal(weights(model), before)
    with pytest.raises(StopIteration):
        next(held)
    assert train(engine)[-1].samples_seen == 700


def test_a_loop_over_micro_batches_that_nobody_holds_ends_itself():
    model = make_model()
    optimizer = ada.ExtrapolatedSGD(model.parameters(), lr=0.05, extrapolation=2.0)
    engine = make_engine(model, optimizer, measure=EVERY, micro_batch_size=2)
    train(engine, steps=3)
    before = weights(model)
    for step in engine:
        for _ in step:
            break
        assert torch.equal(weights(model), before)
        assert not patched(model)
        break


def test_a_second_loop_waits_for_the_step_of_the_first():
    engine = make_engine(make_model())
    first = iter(engine)
    step = next(first)
    with pytest.raises(StepError, match="another loop over this engine is in the middle of a step"):
        next(iter(engine))
    step.run(mean_loss(engine.model))
    step.update()
    assert engine.samples_seen == engine.samples_drawn == 4
    first.close()
    assert train(engine)[-1].samples_seen == 700


def test_a_step_of_weight_zero_is_undone_by_leaving_and_names_the_remedy():
    engine = make_engine(make_model())
    with pytest.raises(InvalidArgument, match=r"weight is 0 .*: leave such examples out .* or raise global_batch_size"):
        train(engine, lambda batch: (mean_loss(engine.model)(batch) * 0, 0.0))
    assert all(p.grad is None for p in engine.model.parameters())
    assert engine.samples_drawn == 0


class OwnOptimizer(torch.optim.SGD):
    """An optimizer from elsewhere, of which only its first update shows what state it keeps."""


def test_an_error_after_the_update_counts_and_records_the_step(tmp_path):
    """The optimizer has stepped, so undoing would train on these examples twice."""
    model = make_model()
    policy = ada.CoordinateNormTest(eta=1.0, reduction="weighted")
    optimizer = OwnOptimizer(model.parameters(), lr=0.1)
    engine = make_engine(model, optimizer, make_data(), policy, measure=EVERY, log_dir=tmp_path)
    with pytest.raises(InvalidArgument, match="second moments"):
        train(engine)
    assert (engine.steps, engine.samples_seen, engine.samples_drawn, engine._assembler.position) == (1, 4, 4, 4)
    assert not torch.equal(weights(model), weights(make_model()))
    assert [line["kind"] for line in read_log(tmp_path)] == ["start", "step"]
    assert math.isfinite(read_log(tmp_path)[1]["loss"])
