"""What changing `accumulate_grad_batches` does to Lightning's own gradients, and that the callback's are right.

If one of the first tests fails after an upgrade, Lightning has mended what it shows: say so in docs/lightning.md.
"""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adadagrad import StagedBatch
from tests.integrations.lightning.cases import QUIET, callback, trainer

pytestmark = QUIET


class TrueGradientOne(pl.LightningModule):
    """One parameter that is its own loss: the mean gradient of any batch is 1."""

    def __init__(self, change=None):
        super().__init__()
        self.net = Weigh()
        self.change, self.gradients, self.seen, self.batches = change, [], [], 0

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].flatten().clone())
        return self.net(batch[0]).mean()

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(float(self.net.weight.grad))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.change is not None:
            self.change(self.trainer, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Weigh(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.weight * torch.ones_like(x)


def rows(count):
    return DataLoader(TensorDataset(torch.arange(float(count)).reshape(-1, 1)), batch_size=8)


def raw(change, accumulate, count=256):
    module = TrueGradientOne(change)
    trainer(max_epochs=1, accumulate_grad_batches=accumulate).fit(module, rows(count))
    return module


def test_lightning_alone_keeps_a_stale_gradient_and_divides_the_last_window_by_the_nominal_count():
    def change(trainer, batch_idx):
        if trainer.global_step == 3:
            trainer.accumulate_grad_batches = 5

    found = raw(change, 2).gradients
    assert [g for g in found if abs(g - 1) > 1e-6] == pytest.approx([1.8, 0.4])


def test_lightning_alone_is_right_where_the_change_is_aligned():
    def change(trainer, batch_idx):
        if trainer.global_step >= 3 and (batch_idx + 1) % 4 == 0:
            trainer.accumulate_grad_batches = 4

    assert raw(change, 2).gradients == pytest.approx([1.0] * len(raw(change, 2).gradients))


def test_lightning_alone_skips_half_an_epoch_when_its_loader_shrinks():
    def change(trainer, batch_idx):
        if batch_idx == 3:
            trainer.train_dataloader.batch_sampler.batch_size = 2

    seen = torch.cat(raw(change, 1).seen)
    assert len(seen) < 0.5 * 256


@pytest.mark.parametrize("first", range(1, 9))
def test_with_the_callback_every_gradient_is_one_for_every_pair_of_counts(first):
    for second in range(1, 9):
        policy = StagedBatch({0: 8 * first, 40: 8 * second})
        adaptive = callback(policy=policy, global_batch_size=None, bounds=None, measure=None)
        module = TrueGradientOne()
        trainer(adaptive, max_epochs=1).fit(module, adaptive.loader(rows(251)))
        assert module.gradients == pytest.approx([1.0] * len(module.gradients), abs=1e-6)
        assert sorted(torch.cat(module.seen).tolist()) == list(range(251))
        sizes = adaptive.decision.plan.global_batch_size
        assert sizes == 8 * second
