"""The five models that measuring is timed on, shapes from a single matrix to attention, and smaller ones to train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadagrad.cli.models import cnn, logistic


class Residual(nn.Module):
    """Two 3x3 convolutions with GroupNorm, and a shortcut that changes width and resolution where they change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.GroupNorm(8, outputs), nn.GroupNorm(8, outputs)])
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, outputs, height / stride, width / stride)."""
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(y)) + self.shortcut(x))


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, normalised first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, T, width)."""
        n, length, width = x.shape
        parts = self.qkv(self.norms[0](x)).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class GPT(nn.Module):
    """A small language model: token and position embeddings, blocks of attention, an untied head."""

    def __init__(
        self, vocabulary: int = 65, length: int = 128, width: int = 192, heads: int = 6, blocks: int = 4
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits (n, vocabulary, T), as cross_entropy wants them."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)


def residual() -> nn.Module:
    """Return a residual network of widths 32, 64 and 128 on 32x32 images."""
    widths = [(32, 32, 1), (32, 64, 2), (64, 128, 2)]
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 1, 1, bias=False),
        nn.GroupNorm(8, 32),
        nn.ReLU(),
        *(Residual(*width) for width in widths),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def small_residual() -> nn.Module:
    """Return a residual network of widths 8, 16 and 32 on 28x28 images of one channel, halved by its stem."""
    widths = [(8, 8, 1), (8, 16, 2), (16, 32, 2)]
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1, bias=False),
        nn.GroupNorm(4, 8),
        nn.ReLU(),
        *(Residual(*width) for width in widths),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def mlp() -> nn.Module:
    """Return a perceptron 784-512-512-10."""
    layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


@dataclass(frozen=True)
class Workload:
    """A model, its batch size, and data to train on.

    Args:
        build: Makes the model.
        batch: Examples in a step.
        shape: Shape of one input; integers below 65 where `tokens`.
        steps: Steps that are timed together, so that a small model's are long enough for the clock.
        tokens: Whether inputs are tokens, each with a target.
        device: Where model and data are.
    """

    build: Callable[[], nn.Module]
    batch: int
    shape: tuple[int, ...]
    steps: int = 1
    tokens: bool = False
    device: str = "cpu"

    def data(self, n: int) -> tuple[Tensor, Tensor]:
        """Return inputs (n, *shape) and targets (n,) or (n, T), the same every time."""
        generator = torch.Generator().manual_seed(0)
        if self.tokens:
            text = torch.randint(0, 65, (n, self.shape[0] + 1), generator=generator).to(self.device)
            return text[:, :-1], text[:, 1:]
        labels = torch.randint(0, 10, (n,), generator=generator)
        return torch.randn(n, *self.shape, generator=generator).to(self.device), labels.to(self.device)

    def fresh(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return the same new model and optimizer every time."""
        torch.manual_seed(0)
        model = self.build().to(self.device)
        return model, torch.optim.Adagrad(model.parameters(), lr=1e-3)


MODELS = {
    "logistic": Workload(lambda: logistic((1, 28, 28), 10), 1024, (1, 28, 28), steps=20),
    "mlp": Workload(mlp, 512, (1, 28, 28), steps=5),
    "cnn": Workload(lambda: cnn((1, 28, 28), 10), 512, (1, 28, 28)),
    "resnet": Workload(residual, 64, (3, 32, 32)),
    "gpt": Workload(GPT, 16, (128,), tokens=True),
}

LARGE = {
    "large-gpt": Workload(lambda: GPT(length=512, width=768, heads=12, blocks=12), 2, (512,), tokens=True),
}
"""A model of 86 million weights, for an accelerator."""
