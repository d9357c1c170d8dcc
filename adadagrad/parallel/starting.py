"""One script for one process and for many: under ``torchrun`` it joins the others, otherwise it stays as it is.

Processes are started by ``torchrun`` and found by what it writes into the environment; none is started here.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adadagrad.core.errors import InvalidArgument


def under_torchrun() -> bool:
    """Return whether ``torchrun``, or something that sets the same variables, has started this process."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_device(device: str | torch.device | None = None) -> torch.device:
    """Return where this process's model belongs.

    Args:
        device: ``"cpu"``, ``"cuda"`` or a device with a number; None is CUDA where there is any, the CPU elsewhere.

    Returns:
        The device. Under ``torchrun``, ``"cuda"`` is the device whose number is the process's on its machine.

    Raises:
        InvalidArgument: This machine runs more processes than it has CUDA devices.
    """
    wanted = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    if str(wanted) != "cuda" or not under_torchrun():  # another kind, or a number is given
        return wanted
    number, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= devices:
        raise InvalidArgument(
            f"process {number} of this machine has no CUDA device of its own, there are {devices}: start torchrun with "
            f'--nproc-per-node {max(devices, 1)}, or train on the CPU with device="cpu"'
        )
    return torch.device("cuda", number)


def join_process_group(device: str | torch.device | None = None) -> torch.device:
    """Join the process group that ``torchrun`` has started this process for; do nothing where there is none.

    For `fully_shard` and other ways to spread a model; `data_parallel` calls it itself. A group that exists is kept.

    Args:
        device: As for `local_device`. The messages go by nccl for CUDA, by gloo for the CPU.

    Returns:
        Where this process's model belongs; with CUDA it is also made torch's current device.

    Raises:
        InvalidArgument: This machine runs more processes than it has CUDA devices.
    """
    own = local_device(device)
    if not under_torchrun():
        return own
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    return own


def data_parallel(model: nn.Module, device: str | torch.device | None = None) -> nn.Module:
    """Make a model train on all processes of a ``torchrun``; in a plain process return it as it is.

    The same script then runs with ``python train.py`` and with ``torchrun --nproc-per-node 4 train.py``. All processes
    begin with the weights of rank 0. Evaluate ``engine.parallel.module``, which is the model without the wrapper.

    Args:
        model: A module that is not wrapped yet, on any device.
        device: As for `local_device`; in a plain process nothing is moved.

    Returns:
        The model in DistributedDataParallel, on this process's device; or the model itself.

    Raises:
        InvalidArgument: The model is wrapped already, or this machine runs more processes than it has CUDA devices.

    Example:
        >>> from torch import nn
        >>> model = nn.Linear(4, 1)
        >>> data_parallel(model) is model
        True
    """
    if isinstance(model, DistributedDataParallel):
        raise InvalidArgument("model is in DistributedDataParallel already: give data_parallel(...) the module itself")
    if not under_torchrun():
        return model
    own = join_process_group(device)
    model = model.to(own)
    return DistributedDataParallel(model, device_ids=[own] if own.type == "cuda" else None)


def leave_process_group() -> None:
    """Leave the process group, if there is one: the last line of a script, without which nccl warns at the exit.

    After an error it is better left out: it may wait for the others, and ``torchrun`` ends them anyway.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
