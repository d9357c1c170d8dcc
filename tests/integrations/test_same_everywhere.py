"""One model, data set and seed: the plain engine, Lightning, the Hugging Face Trainer, Accelerate and Fabric agree."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import adadagrad as ada

pytest.importorskip("lightning")
pytest.importorskip("transformers")

import lightning.pytorch as pl
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from lightning.fabric import Fabric
from transformers import TrainerCallback

from adadagrad.integrations.fabric import adaptive_batch
from adadagrad.integrations.lightning import AdaptiveBatchCallback
from adadagrad.integrations.transformers import AdaptiveBatchTrainer
from tests.integrations.transformers_cases import arguments

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Lightning's advice,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # and torch's about Lightning
    pytest.mark.filterwarnings("error:a measurement failed"),
]
N, MICRO, EPOCHS = 203, 8, 3
SHARED: dict[str, Any] = {"bounds": ada.Bounds(max_growth=1.7, multiple_of=MICRO), "measure": ada.Measure(every=1)}
ENGINE: dict[str, Any] = {
    **SHARED,
    "global_batch_size": 2 * MICRO,
    "micro_batch_size": MICRO,
    "epochs": EPOCHS,
    "epoch_boundary": "short",
}


def policy() -> ada.NormTest:
    return ada.NormTest(eta=0.3)


class Model(nn.Module):
    """Returns its loss, as the Hugging Face Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.net(x) - y).square().mean()}


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(N, 6, generator=g)
    return x, x.sum(1, keepdim=True) * 0.3 + torch.randn(N, 1, generator=g)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(model.parameters(), lr=0.05)


def loop(engine: ada.AdaptiveBatch, model: nn.Module) -> list[int]:
    sizes = []
    for step in engine:
        step.run(lambda batch: model(*batch)["loss"])
        sizes.append(step.update().observation.global_batch_size)
    return sizes


def with_the_engine(folder: Any) -> tuple[list[int], nn.Module]:
    model = Model()
    return loop(
        ada.AdaptiveBatch(model, optimizer_of(model), TensorDataset(*tensors()), policy(), **ENGINE), model
    ), model


def with_accelerate(folder: Any) -> tuple[list[int], nn.Module]:
    accelerator = Accelerator(cpu=True)
    bare = Model()
    model, optimizer = accelerator.prepare(bare, optimizer_of(bare))
    data = TensorDataset(*tensors())
    return loop(ada.AdaptiveBatch(model, optimizer, data, policy(), accelerator=accelerator, **ENGINE), model), bare


def with_fabric(folder: Any) -> tuple[list[int], nn.Module]:
    fabric = Fabric(accelerator="cpu", devices=1)
    bare = Model()
    model, optimizer = fabric.setup(bare, optimizer_of(bare))
    return loop(adaptive_batch(fabric, model, optimizer, TensorDataset(*tensors()), policy(), **ENGINE), model), bare


def with_lightning(folder: Any) -> tuple[list[int], nn.Module]:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.model(*batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self)

    sizes: list[int] = []

    class Note(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step > len(sizes):
                sizes.append(adaptive.decision.observation.global_batch_size)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    adaptive = AdaptiveBatchCallback(policy(), global_batch_size=2 * MICRO, **SHARED)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(max_epochs=EPOCHS, accelerator="cpu", devices=1, callbacks=[adaptive, Note()], **quiet)
    module = Module()
    loader = DataLoader(TensorDataset(*tensors()), batch_size=MICRO, shuffle=True)
    trainer.fit(module, adaptive.loader(loader))
    return sizes, module.model


def with_transformers(folder: Any) -> tuple[list[int], nn.Module]:
    sizes: list[int] = []

    class Note(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs is not None and "adadagrad/global_batch_size" in logs:
                sizes.append(int(logs["adadagrad/global_batch_size"]))

    model = Model()
    x, y = tensors()
    trainer = AdaptiveBatchTrainer(
        model,
        arguments(folder, gradient_accumulation_steps=2, num_train_epochs=EPOCHS, learning_rate=0.05),
        train_dataset=[{"x": x[i], "y": y[i]} for i in range(N)],
        optimizers=(optimizer_of(model), None),
        callbacks=[Note()],
        policy=policy(),
        epoch_boundary="short",
        **SHARED,
    )
    trainer.train()
    return sizes, model


HOSTS = [with_accelerate, with_fabric, with_lightning, with_transformers]


@pytest.mark.parametrize("host", HOSTS)
def test_the_trace_and_the_weights_are_the_plain_engines(host: Any, tmp_path: Any) -> None:
    expected, plain = with_the_engine(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    sizes, model = host(tmp_path)
    assert len(set(expected)) > 5
    assert sizes == expected
    assert sum(sizes) == EPOCHS * N
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=0, atol=1e-6)
