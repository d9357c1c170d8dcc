"""The data and networks of the study of perturbations: what belongs to a data set, and how the networks are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from adadagrad.apps.universal_perturbation import adversarial_training_loss, find_universal_perturbation
from adadagrad.cli.models import cnn, mlp

EPS = 0.15
GREY = 0.6
"""Contrast under ``--grey``."""


@dataclass(frozen=True)
class Setting:
    """What belongs to a data set.

    Args:
        crafting: Numbers of crafting images, of which the last is used for the second table.
        train: Most images to train on.
        epochs: Of training.
        batch: Images in a step of training.
        search: Epochs of the search; the rows at equal cost have four times as many.
        contrast: Of the images around middle grey, and of eps.
    """

    crafting: tuple[int, ...]
    train: int
    epochs: int
    batch: int
    search: int = 20
    contrast: float = 1.0

    @property
    def eps(self) -> float:
        """Radius [image units]."""
        return EPS * self.contrast

    def shown(self, data: Any) -> TensorDataset:
        """Return the data with their contrast.

        Args:
            data: Images and labels.
        """
        images, labels = data.tensors
        return TensorDataset(images if self.contrast == 1 else 0.5 + self.contrast * (images - 0.5), labels)


SETTINGS = {
    "digits": Setting(crafting=(50, 200), train=10_000, epochs=24, batch=64),
    "mnist": Setting(crafting=(200, 1000), train=20_000, epochs=3, batch=128),
}


def small_cnn(shape: tuple[int, ...]) -> nn.Module:
    """Return the network under test: that of the command line for 8x8 images, a lighter one for larger.

    Args:
        shape: Of one image.
    """
    if shape[-1] < 16:
        return cnn(shape, 10)
    layers = [nn.Conv2d(shape[0], 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * (shape[1] // 4) * (shape[2] // 4), 10))


def train(model: nn.Module, data: TensorDataset, setting: Setting, seed: int, robust: bool = False) -> nn.Module:
    """Train a model, with or without perturbations; return it in evaluation mode.

    Args:
        model: Changed in place.
        data: Images and labels.
        setting: Epochs and batch size.
        seed: Of the order.
        robust: Whether half of every batch carries a perturbation found on that batch.
    """
    images, labels = data.tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(setting.epochs):
        for rows in torch.randperm(len(labels), generator=generator).split(setting.batch):  # type: ignore[no-untyped-call]
            x, y = images[rows], labels[rows]
            if robust:
                found = find_universal_perturbation(
                    model.eval(), x, setting.eps, method="spgd", epochs=2, step=setting.eps / 2
                )
                loss = adversarial_training_loss(model.train(), x, y, found)
            else:
                loss = F.cross_entropy(model.train()(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def networks(data: TensorDataset, setting: Setting, seed: int) -> dict[str, nn.Module]:
    """Return the trained networks: ``"cnn"``, ``"mlp"`` and ``"robust"``, which begins like the first.

    Args:
        data: To train on.
        setting: How.
        seed: Of weights and order.
    """
    shape = tuple(data.tensors[0].shape[1:])
    made: dict[str, nn.Module] = {}
    for name, build in (("cnn", small_cnn), ("mlp", lambda s: mlp(s, 10)), ("robust", small_cnn)):
        torch.manual_seed(seed)
        made[name] = train(build(shape), data, setting, seed, robust=name == "robust")
    return made
