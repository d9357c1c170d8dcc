"""A layer with a rule is counted beside dropout, where the model cannot be rerun: nothing falls back unseen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from adadagrad.statistics import PerExample
from tests.statistics.cases import CASES, Case
from tests.statistics.checking import EVERYTHING, NORMS, assert_exact, losses_of, measure_once


def seeded_losses(case: Case, model: nn.Module) -> Tensor:
    torch.manual_seed(5)
    return losses_of(model, (case.data(5),))


@pytest.mark.parametrize("request_", [NORMS, EVERYTHING], ids=["norms", "everything"])
@pytest.mark.parametrize("case", [case for case in CASES if not case.fallback], ids=lambda case: case.name)
def test_equals_the_loop_with_the_same_dropout(case: Case, request_) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(case.build(), nn.Dropout(0.3)).double()
    instrument = PerExample().open(model, request_)
    for _ in range(4):  # the fourth measurement is the first that verifies nothing
        assert assert_exact(instrument, lambda m: seeded_losses(case, m)) == []
    assert not instrument.fallback


COPIED = ["attention with dropout", "encoder layer", "lstm, two directions, projected", "gru cell", "prelu"]


@pytest.mark.parametrize("case", [case for case in CASES if case.name in COPIED], ids=lambda case: case.name)
def test_a_layer_that_is_done_over_leaves_gradients_and_random_numbers_alone(case: Case) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(case.build(), nn.Dropout(0.3)).double()
    instrument = PerExample(fuse=False).open(model, NORMS)
    for _ in range(4):
        model.zero_grad()
        seeded_losses(case, model).mean().backward()
        plain, after = [p.grad for p in model.parameters()], torch.rand(3)
        measure_once(instrument, lambda m: seeded_losses(case, m))
        assert torch.equal(torch.rand(3), after)
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))
