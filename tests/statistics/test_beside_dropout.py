"""A layer with a rule is counted beside dropout, where the model cannot be rerun: nothing falls back unseen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from adadagrad.statistics import PerExample
from tests.statistics.cases import CASES, Case
from tests.statistics.checking import EVERYTHING, NORMS, assert_exact, losses_of


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
