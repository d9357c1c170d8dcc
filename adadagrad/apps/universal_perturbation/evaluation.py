"""Evaluate perturbations on labelled images: one pass, counts only, so that no batch size changes the answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from adadagrad.apps.universal_perturbation.images import check_images
from adadagrad.apps.universal_perturbation.perturbation import Perturbation, add, random_sign
from adadagrad.apps.universal_perturbation.robustness import RobustnessReport, TransferMatrix
from adadagrad.apps.universal_perturbation.subject import Subject, check_target
from adadagrad.apps.universal_perturbation.tally import Tally
from adadagrad.core.checks import check_integer
from adadagrad.core.errors import EmptyDataset, InvalidArgument

BATCH = 250
"""Images in a forward where a data set is given instead of a loader."""


def evaluate(model: nn.Module, perturbation: Perturbation, loader: Iterable[Any], *, seed: int = 0) -> RobustnessReport:
    """Measure how a model's predictions change under a perturbation, and under random signs of the same size.

    Evaluate on images that the perturbation was not found on: on those the numbers are too high. A small fooling
    ratio says that this search has found little, not that the model is safe.

    Args:
        model: From images in [0, 1] to logits (n, classes), in evaluation mode, on any device.
        perturbation: From `find_universal_perturbation` or `load_perturbation`, or one made by hand.
        loader: Batches (images, labels), as a DataLoader yields them, or a data set of such pairs. Labels are class
            numbers (n,). Its batch size changes nothing but the memory needed.
        seed: Of the random signs.

    Returns:
        The report; three forwards for each image.

    Raises:
        InvalidArgument: The model is in training mode, or images or labels are not what they should be.
        EmptyDataset: There are no images.

    Example:
        >>> model = nn.Flatten().eval()  # the larger of two pixels is the class
        >>> data = [(torch.tensor([[[[0.6, 0.5]]], [[[0.1, 0.9]]]]), torch.tensor([0, 1]))]
        >>> report = evaluate(model, Perturbation(delta=torch.tensor([[[-0.2, 0.2]]]), eps=0.2, method="by hand"), data)
        >>> report.clean_accuracy, report.adversarial_accuracy, report.fooling_ratio, report.dominant_class
        (1.0, 0.5, 0.5, 1)
    """
    _check_perturbation(perturbation, "perturbation")
    check_integer(-(2**63), seed=seed)
    return _reports(Subject(model), [perturbation], loader, seed)[0]


def transfer_matrix(
    perturbations: Mapping[str, Perturbation], models: Mapping[str, nn.Module], loader: Iterable[Any], *, seed: int = 0
) -> TransferMatrix:
    """Evaluate every perturbation on every model, on the same images.

    Args:
        perturbations: By name.
        models: By name, all in evaluation mode.
        loader: As for `evaluate`; read once for each model, so it must not be used up by that.
        seed: Of the random signs.

    Returns:
        The reports by both names; one forward for each image, model and perturbation, and two more.

    Raises:
        InvalidArgument: There is no perturbation or model, the loader can be read only once, or one of the models,
            perturbations or images is not what it should be.
    """
    if not perturbations or not models:
        raise InvalidArgument(f"perturbations and models must not be empty, got {len(perturbations)} and {len(models)}")
    for name, perturbation in perturbations.items():
        _check_perturbation(perturbation, f"perturbations[{name!r}]")
    check_integer(-(2**63), seed=seed)
    subjects = {name: Subject(model, f"models[{name!r}]") for name, model in models.items()}
    if len(models) > 1 and isinstance(loader, Iterator):
        raise InvalidArgument("loader must be readable once for each model, got an iterator: pass a list or DataLoader")
    columns = {
        name: _reports(subject, list(perturbations.values()), loader, seed) for name, subject in subjects.items()
    }
    return TransferMatrix(
        reports={
            name: {model: column[index] for model, column in columns.items()}
            for index, name in enumerate(perturbations)
        }
    )


def _reports(
    subject: Subject, perturbations: Sequence[Perturbation], loader: Iterable[Any], seed: int
) -> list[RobustnessReport]:
    """Read the images once and count for each perturbation, and for one random perturbation for each shape and eps."""
    keys = [(tuple(one.delta.shape), one.eps) for one in perturbations]
    random = {key: random_sign(torch.Size(key[0]), key[1], seed) for key in keys}
    pairs = [(one, Tally(one.target)) for one in perturbations]
    # A random perturbation is counted for each target, at the price of a table, but evaluated once.
    baselines = {
        key: [Tally(one.target) for one, k in zip(perturbations, keys, strict=True) if k == key] for key in random
    }
    seen = 0
    for images, labels in _batches(loader):
        for perturbation in perturbations:
            check_images(images, "images of loader", perturbation.delta.shape)
        placed = subject.place(images)
        clean, classes = subject.predictions(placed)
        for one in perturbations:
            check_target(one.target, classes)
        truth = _checked_labels(labels, len(images), classes).to(clean.device)
        for perturbation, tally in pairs:
            tally.add(truth, clean, _perturbed(subject, placed, perturbation), classes)
        for key, tallies in baselines.items():
            after = _perturbed(subject, placed, random[key])
            for tally in tallies:
                tally.add(truth, clean, after, classes)
        seen += len(images)
    if not seen:
        raise EmptyDataset("loader yields no images: pass at least one batch")
    queues = {key: iter(tallies) for key, tallies in baselines.items()}
    return [
        tally.report(perturbation, next(queues[key]).report(random[key], None))
        for key, (perturbation, tally) in zip(keys, pairs, strict=True)
    ]


def _perturbed(subject: Subject, images: Tensor, perturbation: Perturbation) -> Tensor:
    return subject.predictions(add(images, perturbation.delta.to(images)))[0]


def _batches(loader: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    source: Iterable[Any] = loader
    if isinstance(loader, Dataset):
        source = DataLoader(loader, batch_size=BATCH, generator=torch.Generator().manual_seed(0))
    elif isinstance(loader, Tensor | tuple) or not isinstance(loader, Iterable):
        raise InvalidArgument(
            f"loader must yield batches (images, labels), got a {type(loader).__name__}: pass a DataLoader, a Dataset "
            "of pairs, or a list of batches"
        )
    for batch in source:
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise InvalidArgument(f"loader must yield batches (images, labels), got a {type(batch).__name__} in it")
        yield batch[0], batch[1]


def _checked_labels(labels: Any, count: int, classes: int) -> Tensor:
    good = isinstance(labels, Tensor) and labels.shape == (count,)
    if not good or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        got = f"{tuple(labels.shape)} of {labels.dtype}" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
        raise InvalidArgument(f"labels of loader must be class numbers of shape ({count},), got {got}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise InvalidArgument(
            f"labels of loader must be >= 0 and < {classes}, the number of the model's classes, got {low} to {high}"
        )
    numbers: Tensor = labels.long()
    return numbers


def _check_perturbation(perturbation: object, name: str) -> None:
    if not isinstance(perturbation, Perturbation):
        raise InvalidArgument(
            f"{name} must be a Perturbation, got a {type(perturbation).__name__}: for a tensor of your own write "
            'Perturbation(delta=delta, eps=eps, method="by hand")'
        )
