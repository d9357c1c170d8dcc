"""A step used in the wrong order is refused, nothing is trained, and nothing stays on the model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import adadagrad as ada
from adadagrad.core.errors import InvalidArgument, LeftoverGradients, LossWithoutGradient, StepError
from tests.engine.cases import make_data, make_engine, make_model, mean_loss, patched, train, weights

EVERY = ada.Measure(every=1)


def start(measure=EVERY, **options):
    """An engine on its first step, of two micro-batches, measured unless told otherwise."""
    options = {"global_batch_size": 8, "micro_batch_size": 4, "total_samples": 200, "measure": measure, **options}
    model = make_model()
    engine = make_engine(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)
    iterator = iter(engine)
    return engine, iterator, next(iterator)


def loss_of(engine, batch):
    return mean_loss(engine.model)(batch)


def untouched(engine):
    """No parameter changed, no gradient left by a closed step, nothing patched."""
    assert torch.equal(weights(engine.model), weights(make_model()))
    assert not patched(engine.model)


LOSSES = {
    "detached": (lambda e, b: loss_of(e, b).detach(), LossWithoutGradient, "loss does not require grad.*detach"),
    "constant": (lambda e, b: torch.tensor(1.0), LossWithoutGradient, "loss does not require grad"),
    "per example": (
        lambda e, b: F.cross_entropy(e.model(b[0]), b[1], reduction="none"),
        InvalidArgument,
        r"loss must be a scalar, got shape \(4,\).*\(loss.sum\(\), weight\)",
    ),
    "a number": (lambda e, b: 0.5, InvalidArgument, "loss must be a tensor, got float"),
    "nothing": (lambda e, b: None, InvalidArgument, "loss must be a tensor, got NoneType"),
    "weights of another shape": (
        lambda e, b: (loss_of(e, b), torch.ones(3)),
        InvalidArgument,
        r"weight must be a number or have shape \(4,\), got shape \(3,\)",
    ),
    "negative weights": (lambda e, b: (loss_of(e, b), -1.0), InvalidArgument, "weight must not be negative"),
    "one negative weight": (
        lambda e, b: (loss_of(e, b), torch.tensor([1.0, 1.0, -0.5, 1.0])),
        InvalidArgument,
        "weight must not be negative",
    ),
    "nan weight": (lambda e, b: (loss_of(e, b), float("nan")), InvalidArgument, "weight must"),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("measure", [None, EVERY, ada.Measure(estimator=ada.MicroBatch(units=2), every=1)])
def test_a_bad_loss_is_refused_before_its_backward(name, measure):
    function, error, message = LOSSES[name]
    engine, iterator, step = start(measure)
    with pytest.raises(error, match=f"(?s){message}"):
        step.run(lambda batch: function(engine, batch))
    assert all(p.grad is None for p in engine.model.parameters())
    untouched(engine)
    with pytest.raises(StepError, match="micro-batches are left"):
        step.update()
    iterator.close()
    untouched(engine)
    decisions = train(engine)
    assert sum(d.observation.global_batch_size for d in decisions) == 200


def test_a_model_under_no_grad_is_refused():
    engine, _, step = start()
    with pytest.raises(LossWithoutGradient, match=r"torch\.no_grad"), torch.no_grad():
        step.run(lambda batch: loss_of(engine, batch))
    untouched(engine)


def test_update_twice():
    engine, _, step = start()
    step.run(mean_loss(engine.model))
    step.update()
    after = weights(engine.model)
    with pytest.raises(StepError, match="update was called twice"):
        step.update()
    assert torch.equal(after, weights(engine.model))
    assert engine.steps == 1


def test_update_before_any_micro_batch():
    engine, _, step = start()
    with pytest.raises(StepError, match="2 of 2 micro-batches are left: loop over the whole step"):
        step.update()
    untouched(engine)


def test_update_inside_the_loop_over_micro_batches():
    engine, _, step = start()
    for batch in step:
        step.backward(loss_of(engine, batch))
        with pytest.raises(StepError, match="micro-batches are left"):
            step.update()
        break
    untouched(engine)


@pytest.mark.parametrize("after", ["before backward", "after backward"])
def test_leaving_a_step_by_break_then_update(after):
    engine, iterator, step = start()
    for batch in step:
        if after == "after backward":
            step.backward(loss_of(engine, batch))
        break
    with pytest.raises(StepError, match=r"of 2 micro-batches are left.*no break"):
        step.update()
    untouched(engine)
    iterator.close()
    assert all(p.grad is None for p in engine.model.parameters())


def test_a_micro_batch_without_backward():
    engine, _, step = start()
    with pytest.raises(StepError, match="micro-batch 1 of 2 had no backward"):
        for _batch in step:
            pass
    untouched(engine)


def test_the_next_step_without_update():
    engine, iterator, step = start()
    step.run(mean_loss(engine.model))
    with pytest.raises(StepError, match=r"left without update: call step\.update\(\)"):
        next(iterator)
    untouched(engine)
    assert all(p.grad is None for p in engine.model.parameters())


def test_backward_outside_the_loop():
    engine, _, step = start()
    x, y = make_data().tensors[:2]
    with pytest.raises(StepError, match=r"no micro-batch is waiting: call step.backward.loss. inside the loop"):
        step.backward(loss_of(engine, (x[:4], y[:4])))
    untouched(engine)
    step.run(mean_loss(engine.model))
    with pytest.raises(StepError, match="no micro-batch is waiting"):
        step.backward(loss_of(engine, (x[:4], y[:4])))


def test_two_backwards_for_one_micro_batch():
    engine, _, step = start()
    with pytest.raises(StepError, match="no micro-batch is waiting"):  # noqa: PT012
        for batch in step:
            loss = loss_of(engine, batch)
            step.backward(loss)
            step.backward(loss)
    untouched(engine)


@pytest.mark.parametrize("how", ["loop", "run"])
def test_a_step_is_iterated_once(how):
    engine, _, step = start()
    step.run(mean_loss(engine.model))
    with pytest.raises(StepError, match="a step can be iterated once"):
        step.run(mean_loss(engine.model)) if how == "run" else list(step)
    untouched(engine)


def test_weights_for_some_micro_batches_only():
    engine, _, step = start()
    forms = iter([True, False])
    with pytest.raises(StepError, match="either every micro-batch of a step has a weight or none"):
        step.run(lambda batch: (loss_of(engine, batch), 4.0) if next(forms) else loss_of(engine, batch))
    untouched(engine)


@pytest.mark.parametrize("measure", [None, EVERY])
def test_a_gradient_from_outside_is_refused_before_it_mixes(measure):
    engine, iterator, step = start(measure)
    step.run(mean_loss(engine.model))
    step.update()
    after = weights(engine.model)
    x, y = make_data().tensors[:2]
    loss_of(engine, (x, y)).backward()
    with pytest.raises(LeftoverGradients, match=r"0\.weight\.grad.*call optimizer\.zero_grad\(\)"):
        next(iterator)
    assert torch.equal(after, weights(engine.model))
    engine.optimizer.zero_grad()
    assert len(train(engine, steps=2)) == 2


@pytest.mark.parametrize("measure", [None, EVERY, ada.Measure(estimator=ada.MicroBatch(units=2), every=1)])
@pytest.mark.parametrize("fail_at", [0, 1])
def test_an_error_of_the_users_own_leaves_no_trace(measure, fail_at):
    engine, iterator, _ = start(measure)
    iterator.close()
    calls = iter(range(100))

    def loss(batch):
        value = loss_of(engine, batch)
        if next(calls) == fail_at:
            raise KeyError("typo")
        return value

    with pytest.raises(KeyError, match="typo"):
        train(engine, loss)
    untouched(engine)
    assert all(p.grad is None for p in engine.model.parameters())
    assert (engine.steps, engine.samples_seen, engine.samples_drawn) == (0, 0, 0)
    # and the run that then goes on is the uninterrupted one
    fresh, iterator, _ = start(measure)
    iterator.close()
    assert [d.requested for d in train(engine)] == [d.requested for d in train(fresh)]
    assert torch.equal(weights(engine.model), weights(fresh.model))


def test_nothing_is_patched_outside_a_measured_micro_batch():
    engine, iterator, step = start()
    assert not patched(engine.model)
    for index, batch in enumerate(step):
        assert bool(patched(engine.model)) == (index < step.split.measured)
        step.backward(loss_of(engine, batch))
    assert not patched(engine.model)
    step.update()
    iterator.close()


def test_a_failing_measurement_never_harms_training(monkeypatch):
    """It is marked invalid and training goes on, with the gradient bit for bit."""
    from adadagrad.statistics.rules.linear import LinearRule

    plain, iterator, _ = start(None, policy=ada.StagedBatch({0: 8}), global_batch_size=None)
    iterator.close()
    train(plain)
    for error in (RuntimeError("kernel"), ValueError("shape"), torch.OutOfMemoryError("full"), KeyError("name")):

        def broken(self, *args, error=error, **kwargs):
            raise error

        engine, iterator, _ = start(EVERY, policy=ada.NormTest(eta=1e-3))
        iterator.close()
        monkeypatch.setattr(LinearRule, "square_norms", broken)
        monkeypatch.setattr(LinearRule, "inner_products", broken)
        with pytest.warns(UserWarning, match="a measurement failed, the step is not affected"):
            decisions = train(engine)
        monkeypatch.undo()
        assert {d.observation.gradient for d in decisions} == {None}
        assert {d.plan.global_batch_size for d in decisions} == {8}
        assert decisions[0].reason == "measurement failed"
        assert torch.equal(weights(engine.model), weights(plain.model))
        assert not patched(engine.model)


def test_a_micro_batch_of_weight_zero_takes_part_with_weight_zero():
    """A micro-batch whose tokens are all masked is no error."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    iterator = iter(make_engine(model, optimizer, policy=ada.ConstantBatch(6), micro_batch_size=2))
    step, batches = next(iterator), []
    for number, batch in enumerate(step):
        batches.append(batch)
        keep = float(number == 1)
        step.backward(mean_loss(model)(batch) * 2 * keep, weight=2 * keep)
    found = torch.cat([p.grad.flatten() for p in model.parameters()]) * step.correction
    model.zero_grad()
    mean_loss(model)(batches[1]).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.allclose(found, expected, rtol=1e-12, atol=0)


def test_a_step_of_weight_zero_is_refused():
    engine, _, step = start(None)
    for batch in step:
        step.backward(loss_of(engine, batch) * 0, weight=0.0)
    with pytest.raises(InvalidArgument, match="weight is 0 for every example of the step"):
        step.update()
