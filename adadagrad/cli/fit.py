"""Data that can be trained on and a model that fits it, checked on two examples before anything is trained."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from adadagrad.cli.data import DataSource
from adadagrad.cli.own_code import own_code
from adadagrad.core.errors import EmptyDataset, InvalidData

LABEL_TYPES = (torch.int64, torch.uint8)
"""What the cross-entropy takes as class numbers."""


def check_data(data: DataSource) -> None:
    """Refuse what is not two data sets of (input, class number).

    Args:
        data: What ``--data`` names.

    Raises:
        InvalidData: A data set has no length, its first example is not such a pair, or a label is no class number.
        EmptyDataset: A data set holds no example.
    """
    for part, dataset in _parts(data):
        where = f"--data {data.name}: the {part} data"
        if isinstance(dataset, DataLoader):
            raise InvalidData(f"{where} are a DataLoader: return the data set itself")
        if not isinstance(dataset, Sized):
            raise InvalidData(f"{where}: {type(dataset).__name__} has no length: give a map-style data set")
        if len(dataset) == 0:
            raise EmptyDataset(f"{where} are empty")
        with own_code(f"{where}, asked for example 0,"):
            example = dataset[0]
        if not isinstance(example, tuple | list) or len(example) != 2:
            raise InvalidData(f"{where} must hold pairs (input tensor, class number), got {_kind(example)}")
        _check_numbers(where, example[0])
        _check_labels(where, *_all_labels(dataset, example[1]))


def check_fit(model: nn.Module, spec: str, data: DataSource, *, trains: bool = True) -> None:
    """Refuse a model that does not turn the data's inputs into one logit for each class.

    The model sees two examples of either part, in evaluation mode; modes and random states are as before afterwards.

    Args:
        model: The model, on its device.
        spec: What ``--model`` says.
        data: The data.
        trains: Whether the model is to be trained, and so must have something to train.

    Raises:
        InvalidData: The model has nothing to train, raises, or its output does not fit the labels.
    """
    if trains and not any(p.requires_grad for p in model.parameters()):
        raise InvalidData(f"--model {spec} has no parameter that requires a gradient: there is nothing to train")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = [(module, module.training) for module in model.modules()]
    for part, dataset in _parts(data):
        with torch.random.fork_rng(), torch.no_grad(), own_code(f"--data {data.name}: joining {part} examples"):
            inputs, labels = default_collate([dataset[index] for index in range(min(2, len(dataset)))])  # type: ignore[arg-type]
        place = f"--model {spec}, given {part} inputs of shape {tuple(inputs.shape)} and {inputs.dtype},"
        model.eval()
        try:
            with torch.random.fork_rng(), torch.no_grad(), own_code(place):
                logits = model(inputs.to(device))
        finally:
            for module, training in modes:
                module.training = training
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(inputs):
            raise InvalidData(f"{place} must return logits (n, classes), got {_kind(logits)}")
        highest = int(_all_labels(dataset, labels)[0].max())
        if highest >= logits.shape[1]:
            raise InvalidData(
                f"{place} returns {logits.shape[1]} logits an example, but the class numbers of --data {data.name} go "
                f"up to {highest}: give the model {highest + 1} outputs"
            )


def _parts(data: DataSource) -> tuple[tuple[str, Dataset[Any]], tuple[str, Dataset[Any]]]:
    return ("training", data.train), ("test" if data.split == "test" else "validation", data.held_out)


def _all_labels(dataset: Dataset[Any], known: Any) -> tuple[Any, int]:
    """Every label and the number of its dimensions where that costs nothing; elsewhere the ones that are known."""
    return (dataset.tensors[1], 1) if isinstance(dataset, TensorDataset) else (known, 0)


def _check_numbers(where: str, value: object) -> None:
    try:
        torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidData(f"{where}: an input must be a tensor, got {_kind(value)}") from error


def _check_labels(where: str, labels: object, dimensions: int) -> None:
    try:
        numbers = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidData(f"{where}: a label must be a class number, got {_kind(labels)}") from error
    if numbers.dtype not in LABEL_TYPES or numbers.ndim != dimensions:
        raise InvalidData(f"{where}: labels must be class numbers 0, 1, ... of torch.int64, got {_kind(labels)}")
    if int(numbers.min()) < 0:
        raise InvalidData(f"{where}: labels must be class numbers 0, 1, ..., got {int(numbers.min())}")


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__
