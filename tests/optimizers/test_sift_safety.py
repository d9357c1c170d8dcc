"""What could go wrong around SIFT without a word: ranks that part, scaled gradients, states and models of others."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adadagrad.core.errors import InvalidArgument
from adadagrad.optimizers import SIFT
from tests.optimizers.test_sift import batch, make_model, train, values
from tests.ranks import on_ranks

WRAPPINGS: list[dict[str, Any]] = [{}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}]


def in_wrappers(rank: int) -> list[str]:
    """What a step with hooks says in each kind of wrapper, and what it says where there is none."""
    said = []
    for options in (*WRAPPINGS, None):
        model = make_model()
        wrapped = model if options is None else DistributedDataParallel(model, **options)
        optimizer = SIFT(model.parameters(), lr=0.01, rate=0.1)
        message = "nothing"
        for t in range(3):
            x, y = batch(t)
            F.cross_entropy(wrapped(x.chunk(2)[rank]), y.chunk(2)[rank]).backward()
            before = values(model)
            try:
                optimizer.step()
            except InvalidArgument as error:
                message = f"{t}: {error}"
                assert all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))
                break
            optimizer.zero_grad()
        said.append(message)
    return said


def test_hooks_in_any_wrapper_that_averages_are_refused_at_the_first_step() -> None:
    """With a search for unused parameters, nothing but the wrapper itself tells of it, and ranks would part."""
    for said in on_ranks(2, in_wrappers):
        assert all(message.startswith("0: gradients are taken out of .grad before Dist") for message in said[:3]), said
        assert all(message.endswith("pass free_gradients=False") for message in said[:3])
        assert said[3] == "nothing"  # a model of each rank's own may be trained with hooks


def test_a_gradient_written_after_it_was_taken_is_refused() -> None:
    model = make_model()
    optimizer = SIFT(model.parameters(), lr=0.01, rate=0.1)
    train(optimizer, model, range(2))
    F.cross_entropy(model(batch(2)[0]), batch(2)[1]).backward()
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    with pytest.raises(InvalidArgument, match="a gradient was written after it had been taken, as Distributed"):
        optimizer.step()


def test_a_grad_scaler_is_refused_with_hooks_and_works_without() -> None:
    """Beside a head that is trained whole it would unscale that alone, and step on gradients 65536 times too large."""
    found = []
    for scaled in (True, False):
        model = make_model()
        groups = [{"params": model[:4].parameters()}, {"params": model[4].parameters(), "rate": None}]
        optimizer = SIFT(groups, torch.optim.SGD, lr=0.1, rate=0.1, free_gradients=False)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        for t in range(4):
            x, y = batch(t)
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append(values(model))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    model = make_model()
    groups = [{"params": model[:4].parameters()}, {"params": model[4].parameters(), "rate": None}]
    optimizer = SIFT(groups, torch.optim.SGD, lr=0.1, rate=0.1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(F.cross_entropy(model(batch(0)[0]), batch(0)[1])).backward()
    with pytest.raises(InvalidArgument, match=r"GradScaler unscales .grad, .* pass free_gradients=False"):
        scaler.step(optimizer)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_chooses_nothing(bad: float) -> None:
    """As of the first steps under a loss scale that is too large."""
    p = nn.Parameter(torch.zeros(4).double())
    optimizer = SIFT([p], torch.optim.SGD, lr=1.0, rate=0.25)
    for grad in ([bad, bad, 0.0, 0.0], [0.0, 0.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0]):
        (p * torch.tensor(grad).double()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert p.detach().tolist() == [0.0, 0.0, -1.0, -1.0]


def test_what_chose_is_let_go_and_counts_no_further() -> None:
    """Also where nobody calls zero_grad: the next gradient is not added to it."""
    p = nn.Parameter(torch.zeros(4).double())
    optimizer = SIFT([p], torch.optim.SGD, lr=1.0, rate=0.25)
    for grad in ([0.0, 5.0, 7.0, 0.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]):
        (p * torch.tensor(grad).double()).sum().backward()
        optimizer.step()
        assert p.grad is None
    assert p.detach().tolist() == [0.0, -2.0, -2.0, 0.0]


def test_frozen_parameters_are_left_alone_until_they_are_unfrozen() -> None:
    model = make_model()
    model[0].weight.requires_grad_(False)
    optimizer = SIFT(model.parameters(), lr=0.01, rate=0.1)
    start = values(model)
    train(optimizer, model, range(3))
    assert torch.equal(model[0].weight, start[0])
    assert not torch.equal(model[2].weight, start[2])
    model[0].weight.requires_grad_(True)
    train(optimizer, model, range(3, 6))
    assert int((model[0].weight != start[0]).sum()) == 5


def test_detaching_within_a_window_loses_no_micro_batch() -> None:
    found = []
    for detach in (True, False):
        model = make_model()
        optimizer = SIFT(model.parameters(), torch.optim.SGD, lr=0.1, rate=0.1)
        train(optimizer, model, range(1))
        for t in (1, 2):
            F.cross_entropy(model(batch(t)[0]), batch(t)[1]).backward()
            if detach:
                optimizer.detach()
        optimizer.step()
        found.append(values(model))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


class Counting(torch.optim.SGD):
    """A base that counts its steps in an option, as some optimizers do."""

    def __init__(self, params: Any, lr: float = 0.1, k: int = 0) -> None:
        super().__init__(params, lr=lr)
        self.defaults["k"] = k
        for group in self.param_groups:
            group.setdefault("k", k)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] += 1
        super().step()


def test_what_the_base_counts_in_its_options_is_kept_and_saved() -> None:
    model, other = make_model(), make_model()
    one, two = SIFT(model.parameters(), Counting, rate=0.1), SIFT(other.parameters(), Counting, rate=0.1)
    train(one, model, range(4))
    two.load_state_dict(one.state_dict())
    train(two, other, range(2))
    assert [one.param_groups[0]["k"], two.param_groups[0]["k"]] == [4, 6]


def test_a_model_that_was_converted_since_is_refused() -> None:
    """It would be trained in the precision that it had."""
    model = make_model(torch.float32)
    optimizer = SIFT(model.parameters(), lr=0.01)
    model.double()
    with pytest.raises(InvalidArgument, match=r"a parameter is torch.float64 on cpu, and .* made for torch.float32 on"):
        train(optimizer, model, range(1))


def test_states_of_others_are_refused_and_change_nothing() -> None:
    model = make_model()
    optimizer = SIFT(model.parameters(), lr=0.01, rate=0.1)
    train(optimizer, model, range(2))
    entries = optimizer.state_dict()["state"][0]["indices"].tolist()
    wide = nn.ParameterList([nn.Parameter(torch.zeros(p.shape if i else (6, 9))) for i, p in enumerate(values(model))])
    whole = SIFT([{"params": list(make_model().parameters()), "rate": None}], lr=0.01)
    for state, message in (
        (torch.optim.AdamW(model.parameters()).state_dict(), "state_dict must be one that SIFT's state_dict returned"),
        (
            SIFT(wide.parameters(), lr=0.01, rate=0.1).state_dict(),
            "state is of 54 entries for parameter 0, which",
        ),
        (whole.state_dict(), "state holds parameter 0 as trained whole, or not at all"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            optimizer.load_state_dict(state)
        assert optimizer.state_dict()["state"][0]["indices"].tolist() == entries


def test_how_this_process_trains_is_not_loaded() -> None:
    """A run of one process goes on under a wrapper, and one without float32 copies with them."""
    one, two = make_model(torch.bfloat16), make_model(torch.bfloat16)
    first = SIFT(one.parameters(), torch.optim.SGD, lr=0.1, rate=0.1, master=False)
    train(first, one, range(3))
    second = SIFT(two.parameters(), torch.optim.SGD, lr=0.9, rate=0.1, free_gradients=False)
    two.load_state_dict(one.state_dict())
    second.load_state_dict(first.state_dict())
    group = second.param_groups[0]
    assert (group["lr"], group["free_gradients"], group["master"], second.takes_gradients) == (0.1, False, True, False)
    for model, optimizer in ((one, first), (two, second)):
        train(optimizer, model, range(3, 4))
    assert all(torch.equal(a, b) for a, b in zip(values(one), values(two), strict=True))  # one step: rounded alike
    assert all(
        bool(saved["values"].isfinite().all()) and saved["values"].dtype == torch.float32
        for saved in second.state_dict()["state"].values()
    )
