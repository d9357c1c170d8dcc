"""The data that the command line knows: digits, MNIST in a folder, or a user's own function."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from adadagrad.cli.idx import read_idx
from adadagrad.cli.objects import call_object, is_object_name
from adadagrad.cli.own_code import own_code
from adadagrad.core.errors import InvalidArgument, InvalidData, MissingExtra, UnknownName

SPLIT_SEED = 0
"""Of the split of digits, the same in every run whatever its own seed, so that runs compare."""


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Labelled examples to train on and others to evaluate on.

    Args:
        name: What the user called it.
        train: Pairs (input tensor, class number) to train on.
        held_out: Pairs to evaluate on.
        split: What `held_out` is: ``"val"`` or ``"test"``; it becomes part of the metrics' names.
    """

    name: str
    train: Dataset[Any]
    held_out: Dataset[Any]
    split: str

    def input_shape(self) -> tuple[int, ...]:
        """Return the shape of one input, without a batch dimension."""
        return tuple(torch.as_tensor(self.train[0][0]).shape)

    def num_classes(self) -> int:
        """Return one more than the largest class number in the training data; reads every label."""
        if isinstance(self.train, TensorDataset):
            return int(self.train.tensors[1].max()) + 1
        with own_code(f"--data {self.name}, asked for every label,"):
            labels = (int(self.train[index][1]) for index in range(len(self.train)))  # type: ignore[arg-type]
            return 1 + max(labels)


def load_data(spec: str) -> DataSource:
    """Load the data that a name stands for.

    Args:
        spec: ``digits``, ``mnist:DIR`` or ``package.module:function``.

    Returns:
        The data.

    Raises:
        InvalidData: A folder or file is missing or damaged, or a function returned something else than a pair.
        InvalidArgument: A folder or function is not named, or cannot be found.
        UnknownName: The name is none of the three.
        MissingExtra: scikit-learn is not installed.
    """
    kind, colon, rest = spec.partition(":")
    if spec == "digits":
        return _digits()
    if kind == "mnist":
        if not rest:
            raise InvalidArgument(f"--data {spec}: name the folder with the IDX files, as in mnist:path/to/folder")
        return _mnist(spec, Path(rest))
    if is_object_name(spec):
        return _own(spec)
    if colon:
        raise InvalidArgument(f"--data {spec}: expected digits, mnist:DIR or package.module:function")
    raise UnknownName("data", spec, ("digits", "mnist:DIR", "package.module:function"))


def _digits() -> DataSource:
    """The 1,797 images of scikit-learn, 80 % to train on and 20 % to validate on."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra("scikit-learn", "cli") from error
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32).div_(16).reshape(-1, 1, 8, 8)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, held_out = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    return DataSource(
        name="digits",
        train=TensorDataset(images[train], labels[train]),
        held_out=TensorDataset(images[held_out], labels[held_out]),
        split="val",
    )


def _mnist(spec: str, folder: Path) -> DataSource:
    """The 60,000 training images, and the 10,000 test images to evaluate on: its metrics are called test."""
    if not folder.is_dir():
        raise InvalidData(f"--data {spec}: {folder} is not a folder: name the one that holds the four IDX files")
    return DataSource(name="mnist", train=_images(folder, "train"), held_out=_images(folder, "t10k"), split="test")


def _images(folder: Path, part: str) -> TensorDataset:
    images_path, labels_path = (
        _existing(folder, f"{part}-images-idx3-ubyte"),
        _existing(folder, f"{part}-labels-idx1-ubyte"),
    )
    images: Tensor = read_idx(images_path, dimensions=3)
    labels: Tensor = read_idx(labels_path, dimensions=1)
    if len(images) != len(labels):
        raise InvalidData(f"{images_path} holds {len(images)} images, but {labels_path} {len(labels)} labels")
    return TensorDataset(images.unsqueeze(1).float().div_(255), labels.long())


def _existing(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise InvalidData(f"{folder} holds neither {name} nor {name}.gz: put the four MNIST files there")


def _own(spec: str) -> DataSource:
    made = call_object(spec, "data")
    if not isinstance(made, tuple | list) or len(made) != 2:
        raise InvalidData(f"--data {spec} must return (train_dataset, validation_dataset), got {type(made).__name__}")
    return DataSource(name=spec, train=made[0], held_out=made[1], split="val")
