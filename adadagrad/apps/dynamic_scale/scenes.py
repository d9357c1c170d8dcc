"""Synthetic scenes for detection: digits, few of them small, on a noisy ground."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from adadagrad.apps.dynamic_scale.targets import Target
from adadagrad.core.checks import check_at_least, check_fraction, check_integer
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.mixing import seed_for

SMALL_AREA = 16**2
"""A_s for the default sizes [pixels^2]: small digits have at most 14^2, others at least 22^2."""
_TRIES = 50


@final
class DigitScenes(Dataset[tuple[Tensor, Target]]):
    """Scenes of one to three digits that do not overlap, all small or all large, with torchvision-style targets.

    Exactly ``round(small_fraction * count)`` scenes hold small digits; which ones is part of the seed. Scene i depends
    on (seed, i) and the digits alone. A box is the square that a digit was pasted into; a digit for which no free place
    is found in 50 tries is left out (the first one always stands). All scenes are kept: 4 size^2 bytes each.

    Args:
        digits: (m, h, w) images of single digits, 0 ground to 1 ink.
        labels: (m,) what they show, from 0; targets hold label + 1, since 0 is the background.
        count: Scenes, >= 1.
        small_fraction: Of the scenes, those with small digits, 0 to 1.
        seed: Another one gives other scenes.
        size: Side of a scene [pixels].
        small: Smallest and largest side of small digits [pixels].
        large: The same of the others.
        objects: Fewest and most digits of a scene.
        noise: Standard deviation of the ground's noise, >= 0. The default was chosen so that plain training for 500
            steps finds few small digits (AP 0.14 on average over ten seeds); at 0.1 it finds most, and little is left
            to gain.

    Raises:
        InvalidArgument: An argument is not as described, or a digit would not fit.

    Example:
        >>> scenes = DigitScenes(torch.ones(5, 8, 8), torch.arange(5), count=10, small_fraction=0.1, seed=0)
        >>> image, target = scenes[0]
        >>> image.shape, len(scenes), sum(bool((t["area"] < SMALL_AREA).any()) for _, t in scenes)
        (torch.Size([1, 64, 64]), 10, 1)
    """

    def __init__(
        self,
        digits: Tensor,
        labels: Tensor,
        count: int,
        small_fraction: float = 0.1,
        seed: int = 0,
        *,
        size: int = 64,
        small: tuple[int, int] = (8, 14),
        large: tuple[int, int] = (22, 32),
        objects: tuple[int, int] = (1, 3),
        noise: float = 0.45,
    ) -> None:
        if digits.dim() != 3 or len(digits) == 0 or len(digits) != len(labels):
            raise InvalidArgument(
                f"digits must be (m, h, w) with m labels, got {tuple(digits.shape)} and {len(labels)} labels"
            )
        check_integer(1, count=count, size=size)
        check_integer(-(2**63), seed=seed)
        check_fraction(small_fraction=small_fraction)
        check_at_least(0, noise=noise)
        for name, (low, high) in (("small", small), ("large", large), ("objects", objects)):
            check_integer(1, **{f"{name}[0]": low, f"{name}[1]": high})
            if low > high or (name != "objects" and high > size):
                raise InvalidArgument(f"{name} must rise and fit into {size} pixels, got {(low, high)}")
        self._digits, self._labels = digits.float(), labels.long()
        self.size, self.objects, self.noise = size, objects, noise
        generator = torch.Generator().manual_seed(seed_for(seed))
        chosen = set(torch.randperm(count, generator=generator)[: round(small_fraction * count)].tolist())
        self._scenes = [
            self._scene(seed_for(seed, number), small if number in chosen else large) for number in range(count)
        ]

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """Return a scene.

        Args:
            index: From 0.

        Returns:
            Image (1, size, size), and a dict of ``boxes``, ``labels``, ``area``, ``iscrowd`` and ``image_id``.
        """
        image, boxes, labels = self._scenes[index]
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        flags = torch.zeros(len(labels), dtype=torch.int64)
        return image, {"boxes": boxes, "labels": labels, "area": area, "iscrowd": flags, "image_id": index}

    def _scene(self, seed: int, sides: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        image = torch.randn(1, self.size, self.size, generator=generator) * self.noise
        boxes: list[list[int]] = []
        labels = []
        for _ in range(draw(*self.objects)):
            side, number = draw(*sides), draw(0, len(self._digits) - 1)
            contrast = 0.6 + 0.4 * float(torch.rand((), generator=generator))
            for _ in range(_TRIES):
                left, top = draw(0, self.size - side), draw(0, self.size - side)
                box = [left, top, left + side, top + side]
                if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in boxes):
                    digit = self._digits[number][None, None]
                    ink = F.interpolate(digit, size=(side, side), mode="bilinear", antialias=True)[0]
                    image[:, top : top + side, left : left + side] += contrast * ink
                    boxes.append(box)
                    labels.append(int(self._labels[number]) + 1)
                    break
        return image, torch.tensor(boxes, dtype=torch.float32), torch.tensor(labels)
