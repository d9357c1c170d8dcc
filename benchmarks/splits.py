"""The data of the training tasks, each cut into three parts once and for all: to train, to choose, to report.

Whatever is tuned or decided is decided on `val`; `test` is looked at when everything is settled.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from adadagrad.cli.data import load_data
from adadagrad.core.errors import InvalidData

MNIST_VALIDATION = 5000
"""The last images of MNIST's training files, kept for validation; 55,000 are left to train on."""
LENGTH = 64
"""Characters of a sequence."""
STRIDE = 16
"""Characters from the start of one training sequence to that of the next; they overlap."""


class Splits(NamedTuple):
    """Three parts that share no example.

    Args:
        train: To train on.
        val: To tune and to choose on.
        test: To report on.
    """

    train: TensorDataset
    val: TensorDataset
    test: TensorDataset


@lru_cache(maxsize=1)
def digits(folder: str) -> Splits:
    """Return the 1,797 digits of scikit-learn: 1,078 to train on, 359 and 360 held out.

    The order is that of `load_data`, a fixed permutation, and its held-out part is the test part here.

    Args:
        folder: Not used: the images come with scikit-learn.
    """
    data = load_data("digits")
    inputs, labels = (torch.cat(pair) for pair in zip(data.train.tensors, data.held_out.tensors, strict=True))
    ends = [len(labels) * 3 // 5, len(labels) * 4 // 5]
    return Splits(*map(TensorDataset, inputs.tensor_split(ends), labels.tensor_split(ends)))


@lru_cache(maxsize=1)
def mnist(folder: str) -> Splits:
    """Return MNIST: 55,000 images to train on, the last 5,000 training images, and the 10,000 test images.

    Args:
        folder: Where ``mnist/`` with the four IDX files lies.
    """
    data = load_data(f"mnist:{Path(folder) / 'mnist'}")
    images, labels = data.train.tensors
    cut = len(labels) - MNIST_VALIDATION
    if cut < 1:
        raise InvalidData(f"{folder}/mnist must hold more than {MNIST_VALIDATION} training images, got {len(labels)}")
    return Splits(TensorDataset(images[:cut], labels[:cut]), TensorDataset(images[cut:], labels[cut:]), data.held_out)


@lru_cache(maxsize=1)
def shakespeare(folder: str) -> Splits:
    """Return tiny Shakespeare by position: its first 90 % to train on, 5 % and 5 % held out, as sequences.

    An example is `LENGTH` characters and the same number one further on. Held-out sequences follow each other, so
    that each character is predicted once.

    Args:
        folder: Where ``tinyshakespeare/input.txt`` lies.
    """
    path = Path(folder) / "tinyshakespeare" / "input.txt"
    if not path.is_file():
        raise InvalidData(f"{path} does not exist: put the text there")
    text = path.read_text(encoding="utf-8")
    number = {character: index for index, character in enumerate(sorted(set(text)))}
    codes = torch.tensor([number[character] for character in text])
    train, val, test = codes.tensor_split([len(codes) * 90 // 100, len(codes) * 95 // 100])
    return Splits(sequences(train, STRIDE), sequences(val, LENGTH), sequences(test, LENGTH))


def sequences(codes: Tensor, stride: int) -> TensorDataset:
    """Return every sequence of a text as views of it: however much they overlap, the text is held once.

    Args:
        codes: The text, (characters,) of integers, more than `LENGTH` of them.
        stride: Characters from the start of one sequence to that of the next.

    Returns:
        Pairs of inputs (LENGTH,) and targets (LENGTH,).
    """
    windows = codes.unfold(0, LENGTH + 1, stride)
    return TensorDataset(windows[:, :-1], windows[:, 1:])


def evenly(data: TensorDataset, most: int) -> TensorDataset:
    """Return the same few examples every time, evenly spaced.

    Args:
        data: The examples.
        most: How many at most.

    Returns:
        All of them where there are no more than that.
    """
    tensors: Sequence[Tensor] = data.tensors
    if len(data) <= most:
        return data
    rows = torch.linspace(0, len(data) - 1, most, dtype=torch.float64).long()
    return TensorDataset(*(tensor[rows] for tensor in tensors))
