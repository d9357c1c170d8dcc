"""A step's batch evaluated again: the same examples, random numbers and weights, at other parameters."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import adadagrad as ada
from adadagrad.core.errors import InvalidArgument, NonFiniteGradient, StepError
from adadagrad.optimizers import MARS
from tests.engine.cases import Sizes, make_data, make_engine, make_model, mean_loss, train, weights
from tests.engine.test_gradient import rows_of_steps, weighted_loss
from tests.ranks import on_ranks


class Twice(torch.optim.SGD):
    """SGD that evaluates its closure at the parameters, again there, and once elsewhere, and keeps all gradients."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.05)
        self.seen: list[tuple[Tensor, Tensor, float, float]] = []

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]).clone()

    def step(self, closure: Any = None) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        own = [p.grad for p in params]
        loss, first = closure(), self.gradient()
        again = closure()
        self.seen.append((first, self.gradient(), loss, again))
        for p, grad in zip(params, own, strict=True):
            p.grad = grad
        super().step()


def with_dropout_and_batch_norm() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.3), nn.Linear(7, 3)).double()


@pytest.mark.parametrize("form", [None, "number", "vector"])
def test_the_same_place_gives_the_same_gradient_with_dropout_and_batch_normalisation(form: str | None) -> None:
    """Bit for bit, in ragged micro-batches, and the run is the one without evaluating again."""
    model, plain = with_dropout_and_batch_norm(), with_dropout_and_batch_norm()
    optimizer = Twice(model.parameters())
    options = {"total_samples": 400, "micro_batch_size": 6, "max_grad_norm": 0.4}
    losses = [mean_loss(m) if form is None else weighted_loss(m, form) for m in (model, plain)]
    policy = ada.StagedBatch("0:8 64:15 200:22")
    engine = make_engine(model, optimizer, make_data(), policy, replay=True, **options)
    torch.manual_seed(5)
    decisions = train(engine, losses[0])
    after = torch.rand(3)
    assert len(optimizer.seen) == len(decisions) > 10
    for (first, second, loss, again), decision in zip(optimizer.seen, decisions, strict=True):
        assert torch.equal(first, second)
        assert float(first.norm()) <= 0.4 * (1 + 1e-12)
        assert again == pytest.approx(loss, rel=1e-14)
        assert decision.observation.loss == loss
    torch.manual_seed(5)
    train(make_engine(plain, torch.optim.SGD(plain.parameters(), lr=0.05), make_data(), policy, **options), losses[1])
    assert torch.equal(after, torch.rand(3))
    for (name, a), b in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def exact(params: Any) -> MARS:
    return MARS(params, lr=0.02, gamma=0.3, mode="exact", weight_decay=0.01)


def by_hand(rows: list[Tensor], seed: int = 1) -> Tensor:
    """The same batches, each in one piece, through a closure written by hand."""
    model, (x, y, _, _) = make_model(seed=seed), make_data().tensors
    optimizer = exact(model.parameters())
    for some in rows:

        def closure(some: Tensor = some) -> float:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[some]), y[some])
            loss.backward()
            return loss.item()

        optimizer.step(closure)
    return weights(model)


@pytest.mark.parametrize("micro_batch_size", [1, 7, 64])
def test_exact_mars_under_changing_batches_equals_a_loop_by_hand(micro_batch_size: int) -> None:
    model = make_model()
    policy = ada.NormTest(eta=0.6)
    engine = make_engine(
        model, exact(model.parameters()), policy=policy, replay=True, micro_batch_size=micro_batch_size,
        global_batch_size=6, measure=ada.Measure(every=1, max_examples=None),
    )  # fmt: skip
    decisions = train(engine)
    assert len({d.observation.global_batch_size for d in decisions}) > 3
    torch.testing.assert_close(weights(model), by_hand(rows_of_steps(engine, decisions)), rtol=1e-9, atol=1e-11)


def test_lbfgs_trains_and_equals_a_loop_by_hand() -> None:
    model, other, data = make_model(), make_model(), make_data(40)
    options: dict[str, Any] = {"lr": 0.5, "max_iter": 4, "history_size": 3}
    engine = make_engine(
        model, torch.optim.LBFGS(model.parameters(), **options), data, ada.ConstantBatch(40), replay=True,
        total_samples=200, micro_batch_size=9,
    )  # fmt: skip
    decisions = train(engine)
    x, y = data.tensors[:2]
    optimizer = torch.optim.LBFGS(other.parameters(), **options)
    for _ in range(5):

        def closure() -> float:
            optimizer.zero_grad()
            loss = F.cross_entropy(other(x), y)
            loss.backward()
            return loss.item()

        optimizer.step(closure)
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-8, atol=1e-10)
    losses = [d.observation.loss for d in decisions]
    assert losses[-1] < 0.7 * losses[0]


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Any) -> None:
    whole, part, rest = (make_model(0.2) for _ in range(3))
    options = {"policy": Sizes(largest=30), "replay": True}
    torch.manual_seed(3)
    train(make_engine(whole, exact(whole.parameters()), **options))
    torch.manual_seed(3)
    engine = make_engine(part, exact(part.parameters()), **options)
    train(engine, steps=9)
    engine.save(tmp_path / "run.pt")
    engine = make_engine(rest, exact(rest.parameters()), **options)
    engine.load(tmp_path / "run.pt")
    train(engine)
    assert torch.equal(weights(whole), weights(rest))


def test_a_step_that_ran_out_of_memory_is_replayed_as_it_was_repeated() -> None:
    found = []
    for failing in (False, True):
        model = make_model(0.3)
        optimizer = Twice(model.parameters())
        engine = make_engine(
            model, optimizer, policy=ada.ConstantBatch(20), replay=True, total_samples=100,
            micro_batch_size=10 if failing else 5,
        )  # fmt: skip
        torch.manual_seed(2)
        calls = [0]

        def loss(batch: Any, model: nn.Module = model, failing: bool = failing, calls: list[int] = calls) -> Tensor:
            calls[0] += 1
            if failing and calls[0] == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return F.cross_entropy(model(batch[0]), batch[1])

        if failing:
            with pytest.warns(UserWarning, match="repeated with micro_batch_size=5"):
                train(engine, loss)
        else:
            train(engine, loss)
        assert all(torch.equal(first, second) for first, second, _, _ in optimizer.seen)
        found.append(weights(model))
    assert torch.equal(*found)


class Elsewhere(Twice):
    """Evaluates again at parameters that are not finite, and puts them back."""

    needs_closure = True

    def step(self, closure: Any = None) -> None:
        closure()
        (p, *_), kept = self.param_groups[0]["params"], self.param_groups[0]["params"][0].detach().clone()
        try:
            with torch.no_grad():
                p.fill_(float("nan") if len(self.seen) == 2 else 0.5)
            self.seen.append(())  # type: ignore[arg-type]
            closure()
        finally:
            with torch.no_grad():
                p.copy_(kept)


@pytest.mark.parametrize("on_nonfinite", ["skip", "stop"])
def test_a_gradient_that_is_not_finite_there_skips_the_update(on_nonfinite: str) -> None:
    model = make_model()
    engine = make_engine(
        model, Elsewhere(model.parameters()), policy=ada.ConstantBatch(10), replay=True, total_samples=50,
        on_nonfinite=on_nonfinite,
    )  # fmt: skip
    if on_nonfinite == "stop":
        with pytest.raises(NonFiniteGradient, match="of step 3 are not both finite where the optimizer evaluates"):
            train(engine)
        return
    decisions = train(engine)
    assert [d.reason for d in decisions].count("skipped: non-finite") == 1
    assert decisions[2].reason == "skipped: non-finite"
    assert engine.samples_seen == 50
    assert engine.samples_drawn == 60


def test_what_cannot_be_replayed_is_refused() -> None:
    model = make_model()
    with pytest.raises(InvalidArgument, match=r"optimizer MARS needs a closure .*pass replay=True"):
        make_engine(model, exact(model.parameters()))
    with pytest.raises(InvalidArgument, match="replay does not go with grad_scaler: use bfloat16"):
        make_engine(model, exact(model.parameters()), replay=True, grad_scaler=torch.amp.GradScaler("cpu"))
    table = nn.Sequential(nn.Embedding(5, 3, max_norm=1.0), nn.Flatten(), nn.Linear(3, 2))
    with pytest.raises(
        InvalidArgument, match=r"replay evaluates the model at other parameters .* and 0 changes its own"
    ):
        make_engine(table, torch.optim.SGD(table.parameters(), lr=0.1), replay=True)
    engine = make_engine(model, exact(model.parameters()), replay=True)
    steps = iter(engine)
    step = next(steps)
    for batch in step:
        step.backward(mean_loss(model)(batch))
    with pytest.raises(StepError, match=r"use step.run\(loss_function\), not a loop over the step"):
        step.update()


def test_a_batch_that_was_changed_in_place_is_not_evaluated_again() -> None:
    """Its second gradient would be that of other numbers."""
    model = make_model()
    engine = make_engine(model, Twice(model.parameters()), policy=ada.ConstantBatch(20), replay=True)
    with pytest.raises(StepError, match=r"batch\[0\] was changed in place .*let the loss function compute a new"):
        train(engine, lambda batch: F.cross_entropy(model(batch[0].mul_(2)), batch[1]))
    assert engine.steps == 0


def test_a_loss_function_may_take_entries_out_of_its_batch() -> None:
    """As Hugging Face's losses do with labels."""
    model = make_model()
    optimizer = Twice(model.parameters())
    engine = make_engine(model, optimizer, policy=ada.ConstantBatch(20), replay=True, total_samples=100)

    def loss(batch: Any) -> Tensor:
        batch.pop()
        batch.pop()
        return F.cross_entropy(model(batch.pop(0)), batch.pop())

    train(engine, loss)
    assert len(optimizer.seen) == 5
    assert all(torch.equal(first, second) for first, second, _, _ in optimizer.seen)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_a_step_is_held_after_it(fails: bool) -> None:
    model = make_model()
    optimizer = Twice(model.parameters())
    engine = make_engine(model, optimizer, policy=ada.ConstantBatch(20), replay=True)
    batches: list[weakref.ref[Tensor]] = []

    def loss(batch: Any) -> Tensor:
        batches.append(weakref.ref(batch[0]))
        if fails and len(batches) == 3:  # the first of the second evaluation
            raise RuntimeError("no more")
        return F.cross_entropy(model(batch[0]), batch[1])

    gc.collect()
    gc.disable()
    try:
        if fails:
            with pytest.raises(RuntimeError, match="no more"):
                train(engine, loss)
        else:
            train(engine, loss, steps=2)
        assert len(batches) >= 3
        assert all(batch() is None for batch in batches)
    finally:
        gc.enable()


def of_rank(rank: int) -> Any:
    found = {}
    for name in ("exact", "twice"):
        model = make_model(dropout=0.3 if name == "twice" else 0.0)
        optimizer = exact(model.parameters()) if name == "exact" else Twice(model.parameters())
        engine = make_engine(
            DistributedDataParallel(model), optimizer, policy=Sizes(), min_batch_size=4, micro_batch_size=7,
            replay=True,
        )  # fmt: skip
        train(engine)
        found[name] = weights(model)
        if name == "twice":
            assert all(torch.equal(first, second) for first, second, _, _ in optimizer.seen)  # type: ignore[union-attr]
            assert all(loss == pytest.approx(again) for _, _, loss, again in optimizer.seen)  # type: ignore[union-attr]
    return found


def test_many_ranks_replay_what_they_share() -> None:
    one, two = on_ranks(2, of_rank)
    model = make_model()
    train(
        make_engine(model, exact(model.parameters()), policy=Sizes(), min_batch_size=4, micro_batch_size=7, replay=True)
    )
    torch.testing.assert_close(one["exact"], weights(model), rtol=1e-9, atol=1e-11)
    for name in one:
        assert torch.equal(one[name], two[name])
