"""Small models and images in float64, and the search written out image by image."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from adadagrad.batching import SampleOrder
from adadagrad.core.mixing import seed_for

CLASSES = 3


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A smooth classifier of 5x5 images that says each class about equally often, in evaluation mode."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, CLASSES))
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(3)
        model[3].bias.sub_(model(some_images(500, dtype=torch.float32)).mean(0))
    return model.to(dtype).eval()


def some_images(n: int = 24, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 5, 5, generator=generator, dtype=torch.float64).to(dtype)


def labelled(n: int = 40, seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images and labels, two thirds of them what network() says."""
    images = some_images(n, seed, dtype)
    labels = network(dtype=dtype)(images).argmax(1)
    labels[::3] = (labels[::3] + 1) % CLASSES
    return images, labels


class Watched(nn.Module):
    """Hands everything on to a model and notes the batches that it is asked for with gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.batches: list[Tensor] = []
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.batches.append(x.detach().clone())
        output: Tensor = self.model(x)
        return output


def reference(
    model: nn.Module,
    images: Tensor,
    eps: float,
    *,
    method: str,
    k: int = 4,
    small_batch: int = 10,
    large_batch: int = 250,
    epochs: int = 20,
    loss: str = "clamped_ce",
    beta: float = 9.0,
    momentum: float = 0.9,
    target: int | None = None,
    step: float | None = None,
    seed: int = 0,
) -> tuple[Tensor, int]:
    """The algorithm in plain loops, one image at a time; returns delta and the number of gradients."""
    step = 0.1 * eps if step is None else step
    delta, velocity, count, done = torch.zeros_like(images[0]), torch.zeros_like(images[0]), 0, 0

    def gradient_of_one(at: Tensor, image: Tensor) -> Tensor:
        with torch.no_grad():
            label = int(model(image[None])[0].argmax()) if target is None else target
        variable = at.clone().requires_grad_()
        logits = model(torch.clip(image + variable, 0, 1)[None])[0]
        if loss == "neg_logit":
            value = -logits[label]
        else:
            value = torch.log(torch.exp(logits).sum()) - logits[label]
            if target is None and float(value.detach()) > beta:
                return torch.zeros_like(at)
        value.backward()
        assert variable.grad is not None
        return variable.grad if target is None else -variable.grad

    for epoch in range(epochs):
        order = SampleOrder(len(images), seed).permutation(epoch).tolist()
        for first in range(0, len(order), large_batch):
            rows = order[first : first + large_batch]
            n = len(rows)
            generator = torch.Generator().manual_seed(seed_for(seed, epoch, done))
            total, here = torch.zeros_like(delta), delta
            draws = 1 if method == "spgd" else max(1, math.floor(k * n / small_batch))
            for _ in range(draws):
                chosen = rows
                if method != "spgd":
                    chosen = [rows[i] for i in torch.randperm(n, generator=generator).tolist()[:small_batch]]
                gradient = torch.zeros_like(delta)
                for row in chosen:
                    gradient = gradient + gradient_of_one(here, images[row]) / len(chosen)
                    count += 1
                total = total + gradient
                if method == "sga":
                    here = torch.clip(here + step * torch.sign(gradient), -eps, eps)
            mean = total / draws
            if momentum:
                norm = float(mean.abs().sum())
                velocity = momentum * velocity + (mean / norm if norm else mean)
                mean = velocity
            delta = torch.clip(delta + step * torch.sign(mean), -eps, eps)
            done += 1
    return delta, count


SETTINGS: dict[str, dict[str, Any]] = {
    "sga": {"method": "sga", "k": 2, "small_batch": 3, "large_batch": 10},
    "sga without momentum": {"method": "sga", "k": 1, "small_batch": 4, "large_batch": 9, "momentum": 0.0},
    "sga on logits": {"method": "sga", "k": 2, "small_batch": 5, "large_batch": 24, "loss": "neg_logit"},
    "sga with a low bound": {"method": "sga", "k": 2, "small_batch": 5, "large_batch": 12, "beta": 0.9},
    "sga towards a class": {"method": "sga", "k": 2, "small_batch": 4, "large_batch": 11, "target": 2},
    "sga towards a class on logits": {"method": "sga", "small_batch": 9, "target": 1, "loss": "neg_logit"},
    "sga with long steps": {"method": "sga", "k": 2, "small_batch": 6, "large_batch": 12, "step": 0.07, "seed": 5},
    "spgd": {"method": "spgd", "large_batch": 7},
    "spgd without momentum": {"method": "spgd", "large_batch": 10, "momentum": 0.0, "seed": 3},
    "aggregation": {"method": "aggregation", "k": 3, "small_batch": 4, "large_batch": 10},
}
"""By name; 24 images leave short last batches in most of them."""
