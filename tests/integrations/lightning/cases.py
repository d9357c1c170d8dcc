"""Small Lightning modules, data, and one way to train them with and without the callback."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adadagrad import AdaptiveBatch, Bounds, Measure, NormTest
from adadagrad.integrations.lightning import AdaptiveBatchCallback

os.environ.setdefault("PL_DISABLE_FORK", "1")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

QUIET = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Lightning's advice, and
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's about Lightning
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("error:a measurement failed"),
    pytest.mark.filterwarnings("error:measuring with"),
]
N, MICRO = 101, 8


def data(kind=torch.float32):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(N, 5, generator=g, dtype=torch.float64)
    y = x.sum(1, keepdim=True) * 0.3 + torch.randn(N, 1, generator=g, dtype=torch.float64)
    return TensorDataset(x.to(kind), y.to(kind), torch.arange(N))


class Net(pl.LightningModule):
    """What a user has: a network that the step calls, and a loss."""

    def __init__(self, dropout=0.0, kind=torch.float32, optimizer=torch.optim.Adagrad, lr=0.05):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(5, 4), nn.Dropout(dropout), nn.Tanh(), nn.Linear(4, 1)).to(kind)
        self.optimizer, self.lr, self.seen = optimizer, lr, []

    def loss(self, batch):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[2].clone())
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=self.lr)


class Trace(pl.Callback):
    """Notes each step's global batch; stands after the callback."""

    def __init__(self, adaptive):
        self.adaptive, self.sizes, self.decisions = adaptive, [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        decision = self.adaptive.decision
        if decision is not None and (not self.decisions or decision is not self.decisions[-1]):
            self.decisions.append(decision)
            self.sizes.append(decision.observation.global_batch_size)


def callback(**settings):
    settings = {"measure": Measure(every=1), "bounds": Bounds(max_growth=1.6), **settings}
    settings.setdefault("policy", NormTest(eta=0.3))
    settings.setdefault("global_batch_size", 2 * MICRO)
    return AdaptiveBatchCallback(settings.pop("policy"), **settings)


def trainer(*callbacks, **settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return pl.Trainer(
        callbacks=list(callbacks), **{"max_epochs": 3, "devices": 1, **quiet, "enable_model_summary": False, **settings}
    )


def loader(dataset=None, micro=MICRO, **settings):
    return DataLoader(data() if dataset is None else dataset, batch_size=micro, shuffle=True, **settings)


def fit(module=None, adaptive=None, *, dataset=None, more=(), val=False, ckpt_path=None, **settings):
    """Train with the callback; return module, trace, trainer and callback."""
    module = Net() if module is None else module
    adaptive = callback() if adaptive is None else adaptive
    trace = Trace(adaptive)
    made = trainer(adaptive, trace, *more, **settings)
    validation = DataLoader(data(), batch_size=50) if val else None
    made.fit(module, adaptive.loader(loader(dataset)), validation, ckpt_path=ckpt_path)
    return module, trace, made, adaptive


def plain(module, dataset=None, *, epochs=3, **settings):
    """The engine alone, on the same module, data and seed; returns its trace."""
    settings = {"measure": Measure(every=1), "bounds": Bounds(max_growth=1.6, multiple_of=MICRO), **settings}
    engine = AdaptiveBatch(
        module.net,
        module.configure_optimizers(),
        data() if dataset is None else dataset,
        settings.pop("policy", NormTest(eta=0.3)),
        micro_batch_size=MICRO,
        epochs=epochs,
        epoch_boundary="short",
        **{"global_batch_size": 2 * MICRO, **settings},
    )
    sizes = []
    for step in engine:
        step.run(module.loss)
        sizes.append(step.update().observation.global_batch_size)
    return sizes


def apart(one, other):
    """Largest difference between two modules' weights."""
    return max(
        float((p.detach() - q.detach()).abs().max()) for p, q in zip(one.parameters(), other.parameters(), strict=True)
    )


def keep_all(folder, **settings):
    return ModelCheckpoint(dirpath=folder, save_top_k=-1, **settings)


def newest(folder: str | Path) -> list[Path]:
    return sorted(Path(folder).glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
