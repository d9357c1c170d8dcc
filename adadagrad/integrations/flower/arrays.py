"""Tensors by name as Flower's arrays, and back without trusting what came over a network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from adadagrad.core.errors import InvalidArgument


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name: what travels.

    Args:
        model: Any.
    """
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return tensors as arrays; bfloat16, which numpy does not know, travels as float32 and loses nothing.

    Args:
        tensors: By name.
    """
    plain = {name: tensor.detach() for name, tensor in tensors.items()}
    return ArrayRecord({
        name: tensor.float() if tensor.dtype == torch.bfloat16 else tensor for name, tensor in plain.items()
    })


def from_record(record: ArrayRecord, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a record, in the dtypes and on the devices of others.

    Args:
        record: What has arrived.
        like: The names that it must have, no more and no fewer, and their shapes.

    Returns:
        By name. They may hold numbers that are not finite.

    Raises:
        InvalidArgument: A name is missing or too many, an array cannot be read, or has the wrong shape or no
            floating-point numbers.

    Example:
        >>> weight = torch.tensor([1.0, 2.0])
        >>> from_record(to_record({"weight": weight}), {"weight": weight})
        {'weight': tensor([1., 2.])}
        >>> from_record(to_record({"weight": weight[:1]}), {"weight": weight})
        Traceback (most recent call last):
        adadagrad.core.errors.InvalidArgument: weight has shape (1,), not (2,)
    """
    wrong = sorted(set(record) ^ set(like))
    if wrong:
        raise InvalidArgument(f"names differ from the model's at {wrong[0]}")
    tensors = {}
    for name, tensor in like.items():
        if tuple(record[name].shape) != tuple(tensor.shape):  # before anything is read and memory taken
            raise InvalidArgument(f"{name} has shape {tuple(record[name].shape)}, not {tuple(tensor.shape)}")
        try:
            arrived = torch.from_numpy(record[name].numpy())
        except Exception as error:
            raise InvalidArgument(f"{name} cannot be read: {error}") from error
        if arrived.shape != tensor.shape:
            raise InvalidArgument(f"{name} has shape {tuple(arrived.shape)}, not {tuple(tensor.shape)}")
        if not arrived.is_floating_point():
            raise InvalidArgument(f"{name} holds {arrived.dtype}, not floating-point numbers")
        tensors[name] = arrived.to(tensor.device, tensor.dtype)
    return tensors


@torch.no_grad()
def load(model: nn.Module, record: ArrayRecord) -> None:
    """Put arrays into the trained parameters of a model.

    Args:
        model: Changed in place, whole or not at all.
        record: Their values. Frozen parameters and buffers of the model may be in it, as in the record of a state_dict:
            they are passed over.

    Raises:
        InvalidArgument: The record does not fit the model.
    """
    params = trained(model)
    staying = set(model.state_dict()) - set(params)
    moving = {name: array for name, array in record.items() if name not in staying}
    for name, tensor in from_record(ArrayRecord(moving), params).items():
        params[name].copy_(tensor)
