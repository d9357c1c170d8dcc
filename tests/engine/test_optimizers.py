"""Optimizers under the engine: clipping after statistics, momentum, groups, AdaGrad-Norm."""

from __future__ import annotations

import pytest
import torch

import adadagrad as ada
from tests.engine.cases import Recording, Sizes, losses_of, make_data, make_engine, make_model, put, train, weights
from tests.engine.test_gradient import direct_gradient, rows_of_steps
from tests.oracles import naive_statistics, relative_error


@pytest.mark.parametrize("max_grad_norm", [0.05, 0.3, 100.0])
@pytest.mark.parametrize("micro_batch_size", [3, 64])
def test_statistics_are_of_the_raw_gradient_and_the_update_of_the_clipped_one(max_grad_norm, micro_batch_size):
    data, model = make_data(), make_model()
    optimizer = Recording(model.parameters())
    options = {"max_grad_norm": max_grad_norm, "micro_batch_size": micro_batch_size, "total_samples": 203}
    policy = ada.AugmentedInnerProductTest(theta=0.5, nu=0.5)
    measure = ada.Measure(every=1, max_examples=None)
    engine = make_engine(model, optimizer, data, policy, measure=measure, bounds=ada.Bounds(max_growth=1.3), **options)
    decisions = train(engine)
    clipped = 0
    reference = make_model()
    for d, rows, seen, before in zip(
        decisions, rows_of_steps(engine, decisions), optimizer.gradients, optimizer.before, strict=True
    ):
        raw = direct_gradient(data, rows, before)
        expected = raw * min(1.0, max_grad_norm / float(raw.norm()))
        clipped += bool(raw.norm() > max_grad_norm)
        assert (seen - expected).norm() <= 1e-12 * expected.norm()
        g = d.observation.gradient
        if g is not None:
            truth = naive_statistics(put(reference, before), losses_of(data, rows))
            assert relative_error(g.grad_norm_sq, truth.grad_norm_sq) < 1e-10
            assert relative_error(g.variance_trace, truth.variance_trace) < 1e-10
            assert relative_error(g.inner_product_variance, truth.inner_product_variance) < 1e-9
    assert clipped == (0 if max_grad_norm == 100.0 else len(decisions) if max_grad_norm == 0.05 else clipped)


OPTIMIZERS = {
    "sgd momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.1),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, foreach=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01),
    "adagrad norm": lambda groups: ada.AdaGradNorm(groups, lr=0.5, weight_decay=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("grouped", [False, True])
def test_the_run_is_the_hand_written_loop(name, grouped):
    def groups(model):
        if not grouped:
            return list(model.parameters())
        return [{"params": model[2].parameters()}, {"params": model[0].parameters(), "lr": 0.03}]

    data, model, other = make_data(), make_model(), make_model()
    engine = make_engine(model, OPTIMIZERS[name](groups(model)), data, Sizes(largest=30), micro_batch_size=7)
    decisions = train(engine)
    optimizer = OPTIMIZERS[name](groups(other))
    for rows in rows_of_steps(engine, decisions):
        optimizer.zero_grad()
        losses_of(data, rows)(other).mean().backward()
        optimizer.step()
    assert (weights(model) - weights(other)).norm() <= 1e-10 * weights(other).norm()


def test_a_parameter_without_a_gradient_is_left_alone():
    model = make_model()
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(3, dtype=torch.float64)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decisions = train(make_engine(model, optimizer, measure=ada.Measure(every=1), total_samples=100))
    assert torch.equal(model.unused.detach(), torch.ones(3, dtype=torch.float64))
    assert decisions[0].observation.gradient.num_units == 4


def test_frozen_parameters_are_neither_trained_nor_measured():
    data, model = make_data(), make_model()
    model[0].requires_grad_(False)
    before = weights(model[0])
    optimizer = torch.optim.Adagrad(model[2].parameters(), lr=0.1)
    engine = make_engine(model, optimizer, data, measure=ada.Measure(every=1, max_examples=None), total_samples=100)
    rows = engine._assembler.source.order.indices(0, 4)
    truth = naive_statistics(model, losses_of(data, rows))
    g = train(engine)[0].observation.gradient
    assert relative_error(g.variance_trace, truth.variance_trace) < 1e-10
    assert torch.equal(before, weights(model[0]))


def test_gradients_are_gone_after_every_update():
    model = make_model()
    for step in make_engine(model, measure=ada.Measure(every=1), total_samples=100):
        assert all(p.grad is None for p in model.parameters())
        step.run(lambda batch: model(batch[0]).square().mean())
        step.update()
        assert all(p.grad is None for p in model.parameters())
