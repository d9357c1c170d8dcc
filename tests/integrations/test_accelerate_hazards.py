"""Accelerate's own accumulation gets a changed window wrong, as it did when this was written; the engine does not.

A test of the raw library that fails here is good news: it has been mended upstream, and the documentation can say so.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import adadagrad as ada
from tests.integrations.accelerators import accelerator_of_rank, make_accelerator
from tests.ranks import on_two_ranks

ROWS = 8 * 24


def one_weight() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and data whose gradient is 1, whatever the batch, and an optimizer that changes nothing."""
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    return model, torch.optim.SGD(model.parameters(), lr=0.0)


def raw(accelerator: Any, *, reset: bool = False) -> list[float]:
    """Return the gradients that Accelerate's loop steps with, windows of 2 becoming windows of 5 after three steps."""
    own, optimizer = one_weight()
    loader = DataLoader(
        TensorDataset(torch.ones(ROWS * accelerator.num_processes, 1, dtype=torch.float64)), batch_size=8
    )
    model, optimizer, batches = accelerator.prepare(own, optimizer, loader)
    gradients = []
    for (inputs,) in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(inputs).mean())
            if accelerator.sync_gradients:
                gradients.append(round(float(own.weight.grad), 6))
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients and len(gradients) == 3:
                accelerator.gradient_accumulation_steps = 5
                accelerator.step = 0 if reset else accelerator.step
    return gradients


class Noting(torch.optim.SGD):
    """Notes the gradient of each update."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.0)
        self.gradients: list[float] = []

    def step(self, closure: Any = None) -> None:
        self.gradients.append(float(self.param_groups[0]["params"][0].grad))


def ours(accelerator: Any) -> tuple[list[int], list[float]]:
    """Return the sizes and the gradients of the engine's steps, from 16 examples to 40 after three of them."""
    own, _ = one_weight()
    noting, ranks = Noting(own.parameters()), accelerator.num_processes
    model, optimizer = accelerator.prepare(own, noting)
    sizes: list[int] = []
    policy = ada.StagedBatch(f"0:{16 * ranks} {48 * ranks}:{40 * ranks}")
    engine = ada.AdaptiveBatch(
        model,
        optimizer,
        TensorDataset(torch.ones(ROWS * ranks, 1, dtype=torch.float64)),
        policy,
        micro_batch_size=8,
        epochs=1,
        accelerator=accelerator,
    )
    for step in engine:
        step.run(lambda batch: model(batch[0]).mean())
        step.update()
        sizes.append(step.global_batch_size)
    return sizes, noting.gradients


SIZES = [16, 16, 16, 40, 40, 40, 24]
EXACT = pytest.approx([1.0] * 7, abs=1e-14)


def test_raw_accelerate_shrinks_the_gradient_at_the_change_and_in_the_last_window() -> None:
    assert raw(make_accelerator(gradient_accumulation_steps=2)) == [1, 1, 1, 0.8, 1, 1, 0.8]


def test_resetting_its_counter_leaves_the_last_window_wrong() -> None:
    assert raw(make_accelerator(gradient_accumulation_steps=2), reset=True) == [1, 1, 1, 1, 1, 1, 0.6]


def test_ours_is_exact_in_every_step() -> None:
    assert ours(make_accelerator()) == (SIZES, EXACT)


def on_a_rank(rank: int) -> Any:
    made = accelerator_of_rank(rank)
    found = ours(made)
    return found, raw(accelerator_of_rank(rank, gradient_accumulation_steps=2)), repeated(accelerator_of_rank(rank))


def repeated(accelerator: Any) -> list[int]:
    """Return which of 1003 examples a rank's prepared loader delivers."""
    loader = accelerator.prepare(DataLoader(TensorDataset(torch.arange(1003)), batch_size=8, shuffle=True))
    return [int(index) for (batch,) in loader for index in batch]


@pytest.fixture(scope="module")
def found() -> list[Any]:
    return on_two_ranks(on_a_rank)


def test_two_ranks_raw_and_ours(found: list[Any]) -> None:
    for (sizes, gradients), raw_gradients, _ in found:
        assert sizes == [2 * size for size in SIZES]
        assert gradients == EXACT
        assert raw_gradients == [1, 1, 1, 0.8, 1, 1, 0.8]


def test_raw_prepared_loaders_repeat_examples_to_fill_the_last_batch(found: list[Any]) -> None:
    delivered = found[0][2] + found[1][2]
    assert len(delivered) == 1008  # ours: test_accelerate_ranks.py
    assert len(set(delivered)) == 1003
