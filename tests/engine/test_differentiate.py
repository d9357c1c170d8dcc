"""A host's backward in the place of torch's is called for each micro-batch, also where it is evaluated again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import adadagrad as ada
from adadagrad.optimizers import MARS
from tests.engine.cases import make_engine, make_model, mean_loss, train, weights


@pytest.mark.parametrize("replay", [False, True])
def test_every_backward_is_the_hosts(replay: bool) -> None:
    calls: list[float] = []

    def run(own: bool) -> Any:
        model = make_model()
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        if replay:
            optimizer = MARS(model.parameters(), lr=0.01, mode="exact")
        engine = make_engine(
            model,
            optimizer,
            policy=ada.ConstantBatch(12),
            global_batch_size=None,
            micro_batch_size=4,
            total_samples=36,
            replay=replay,
        )
        if own:
            engine.differentiate = backward
        train(engine, mean_loss(model))
        return weights(model)

    def backward(loss: Tensor) -> None:
        calls.append(loss.item())
        loss.backward()  # type: ignore[no-untyped-call]

    assert torch.equal(run(True), run(False))
    assert len(calls) == (15 if replay else 9)  # the first step has no other place to be evaluated at
