"""Crafting images from whatever holds them, in an order that the seed alone decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from adadagrad.batching import SampleOrder, SeededDataset
from adadagrad.core.errors import EmptyDataset, InvalidArgument, OverriddenSampler, UnsizedDataset

CHUNK = 250
"""Images that are read together where all are checked."""


def check_images(images: object, name: str = "images", shape: Sequence[int] | None = None) -> None:
    """Require a batch of images in [0, 1].

    Args:
        images: (n, C, H, W), n >= 1.
        name: What the message calls it.
        shape: (C, H, W) that they must have; None for any.

    Raises:
        InvalidArgument: It is no tensor of floating-point images, or values lie outside [0, 1] or are NaN.
    """
    if not isinstance(images, Tensor):
        raise InvalidArgument(f"{name} must be a tensor, got a {type(images).__name__}: add transforms.ToTensor()")
    if images.dim() != 4 or images.numel() == 0:
        raise InvalidArgument(f"{name} must have shape (n, C, H, W) with n >= 1, got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise InvalidArgument(f"{name} must be floating point in [0, 1], got {images.dtype}: divide by 255")
    if shape is not None and tuple(images.shape[1:]) != tuple(shape):
        raise InvalidArgument(f"{name} must have shape (n, *{tuple(shape)}) here, got {tuple(images.shape)}")
    low, high = (float(value) for value in torch.aminmax(images.detach()))
    if not (low >= 0 and high <= 1):  # NaN too
        raise InvalidArgument(
            f"{name} must lie in [0, 1], got values from {low:g} to {high:g}: put the normalisation into the model, "
            "as its first layer, and pass the images before it"
        )


@final
class ImageSource:
    """Images by (epoch, index), one permutation an epoch.

    A tensor or a `TensorDataset` is indexed directly. Examples of any other data set are fetched one by one in this
    process, their random augmentation seeded by (seed, epoch, index). Of a DataLoader the data set and the collate
    function are used; its batch size, order and workers are not.

    Args:
        data: A tensor (n, C, H, W), a map-style data set of images or of tuples that begin with one, or a DataLoader
            of such a data set.
        seed: Of order and augmentation.

    Raises:
        InvalidArgument: It is nothing of the kind.
    """

    def __init__(self, data: object, seed: int) -> None:
        collate: Callable[[list[Any]], Any] = default_collate
        if isinstance(data, DataLoader):
            _check_order(data)
            collate, data = data.collate_fn, data.dataset
        if type(data) is TensorDataset and collate is default_collate:
            data = data.tensors[0]
        self._tensor = data if isinstance(data, Tensor) else None
        self._order = SampleOrder(_size(data), seed)
        self._dataset = SeededDataset(data, seed, collate)

    @property
    def size(self) -> int:
        """How many images there are."""
        return self._order.size

    def check(self) -> Tensor:
        """Look at every image once, before any work depends on them.

        Returns:
            The first one, (1, C, H, W).

        Raises:
            InvalidArgument: Some are no images in [0, 1], or they differ in shape.
            EmptyDataset: There are none.
        """
        first: Tensor | None = None
        for images in self.batches(0, CHUNK):
            check_images(images, "data", None if first is None else first.shape[1:])
            first = images[:1] if first is None else first
        if first is None:
            raise EmptyDataset("data is empty: pass at least one image")
        return first

    def batches(self, epoch: int, size: int) -> Iterator[Tensor]:
        """Yield one epoch's images in its order; the last batch may be short.

        Args:
            epoch: Number of the epoch, from 0.
            size: Images in a batch.

        Yields:
            (n, C, H, W) where the data are images; what is read is checked by the caller.
        """
        for indices in torch.split(self._order.permutation(epoch), size):
            yield self._read(epoch, indices)

    def _read(self, epoch: int, indices: Tensor) -> Tensor:
        if self._tensor is not None:
            return self._tensor[indices.to(self._tensor.device)]
        try:
            batch = self._dataset[[(epoch, index) for index in indices.tolist()]]
        except (TypeError, RuntimeError) as error:
            raise InvalidArgument(
                f"data could not be collated into a batch of images ({error}): resize all to one shape, and add "
                "transforms.ToTensor() where they are pictures"
            ) from error
        images: Tensor = batch[0] if isinstance(batch, tuple | list) and batch else batch
        return images


def _size(data: Any) -> int:
    name = type(data).__name__
    if isinstance(data, IterableDataset):
        raise UnsizedDataset(f"data is an iterable data set ({name}): pass a map-style one, or its images as a tensor")
    if isinstance(data, Tensor):
        if data.dim() != 4:
            raise InvalidArgument(f"data must have shape (n, C, H, W), got {tuple(data.shape)}")
    elif not hasattr(data, "__getitem__") or isinstance(data, str | bytes | dict | tuple):
        raise InvalidArgument(f"data must be a tensor (n, C, H, W), a Dataset or a DataLoader, got a {name}")
    try:
        size = len(data)
    except (TypeError, NotImplementedError) as error:
        raise UnsizedDataset(f"data has no length: give {name} a __len__ that counts its images") from error
    if size == 0:
        raise EmptyDataset("data is empty: pass at least one image")
    return size


def _check_order(loader: DataLoader[Any]) -> None:
    """Refuse a loader that selects or repeats examples in a way of its own, which would be silently lost."""
    if loader.batch_sampler is None:
        raise InvalidArgument("data is a DataLoader with batch_size=None: pass its data set itself")
    sampler = getattr(loader.batch_sampler, "sampler", None)
    plain = type(loader.batch_sampler) is BatchSampler and type(sampler) in (SequentialSampler, RandomSampler)
    if plain and isinstance(sampler, RandomSampler):
        plain = not sampler.replacement and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    if not plain:
        raise OverriddenSampler(
            f"the sampler of data ({type(sampler or loader.batch_sampler).__name__}) would be replaced by the order of "
            "the seed: to craft on a part of the data, pass torch.utils.data.Subset(dataset, indices)"
        )
