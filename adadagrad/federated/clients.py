r"""What clients hold and send: a data set split unevenly among them, and one message a round from each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from adadagrad.core.checks import check_choice, check_integer, check_positive
from adadagrad.core.errors import InvalidArgument, InvalidData
from adadagrad.core.mixing import seed_for
from adadagrad.federated.channel import wide

Loss = Callable[[nn.Module, Any], Tensor]


def dirichlet_split(labels: Tensor, num_clients: int, concentration: float, *, seed: int = 0) -> list[Tensor]:
    r"""Split examples among clients so that each holds its own mixture of classes.

    For every class a vector of shares, p ~ Dirichlet(concentration), one for each client, cuts the shuffled examples of
    that class. A client that would get nothing at all is given one example of the client that has most.

    Args:
        labels: Class numbers, shape (n,), integers.
        num_clients: How many clients, >= 1 and at most n.
        concentration: > 0, dimensionless. 0.1 leaves most clients one to three classes; 100 makes all alike.
        seed: Of the split.

    Returns:
        The indices of each client's examples, sorted: disjoint, none empty, together all of them.

    Raises:
        InvalidArgument: An argument is out of its range, or labels are no vector of integers.

    Source: the split that arXiv 2403.06528 uses (second-hand: Dirichlet 0.1 over clients).
    Differs from the paper: no client is left empty.

    Example:
        >>> parts = dirichlet_split(torch.arange(1000) % 10, num_clients=5, concentration=0.1)
        >>> sorted(torch.cat(parts).tolist()) == list(range(1000)), min(len(part) for part in parts) > 0
        (True, True)
    """
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise InvalidArgument(f"labels must be a vector of integers, got {labels.dtype} of shape {tuple(labels.shape)}")
    check_integer(1, num_clients=num_clients)
    check_positive(concentration=concentration)
    check_integer(0, seed=seed)
    if num_clients > len(labels):
        raise InvalidArgument(f"num_clients must be at most the {len(labels)} examples there are, got {num_clients}")
    generator = torch.Generator().manual_seed(seed_for(seed) >> 1)
    parts: list[list[Tensor]] = [[] for _ in range(num_clients)]
    for label in sorted(set(labels.tolist())):
        own = torch.nonzero(labels == label).flatten()
        own = own[torch.randperm(len(own), generator=generator)]
        shares = torch._standard_gamma(
            torch.full((num_clients,), float(concentration), dtype=torch.float64), generator=generator
        )
        shares = shares.clamp_min(torch.finfo(torch.float64).tiny)  # tiny shares may vanish, and 0/0 with them
        ends = (shares.cumsum(0) / shares.sum() * len(own)).round().long()
        ends[-1] = len(own)
        for client, piece in enumerate(torch.tensor_split(own, ends[:-1])):
            parts[client].append(piece)
    clients = [torch.cat(pieces) for pieces in parts]
    for client in range(num_clients):
        if len(clients[client]) == 0:
            richest = max(range(num_clients), key=lambda number: len(clients[number]))
            clients[client], clients[richest] = clients[richest][:1], clients[richest][1:]
    return [indices.sort().values for indices in clients]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalWork:
    """What a client does with the model that it gets, before it sends.

    Args:
        message: ``"gradient"``: the gradient of the mean loss over all its examples, at the weights that it got.
            ``"drift"``: those weights less the ones that it has after `epochs` of gradient descent, which the server
            takes for a gradient.
        epochs: Passes over its examples for a drift, >= 1.
        lr: Rate of its gradient descent for a drift, > 0.
        batch_size: Examples in one of its steps, and in one forward, >= 1. The last of a pass may be smaller.

    Raises:
        InvalidArgument: An argument is out of its range.
        UnknownName: `message` is neither.
    """

    message: Literal["gradient", "drift"] = "gradient"
    epochs: int = 1
    lr: float = 0.1
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_choice("message", self.message, ("gradient", "drift"))
        check_integer(1, epochs=self.epochs, batch_size=self.batch_size)
        check_positive(lr=self.lr)


def client_message(
    model: nn.Module, dataset: Dataset[Any], work: LocalWork, loss: Loss, *, seed: int, round_number: int, client: int
) -> dict[str, Tensor]:
    """Return what one client sends in one round; the model and torch's random state are left as they were.

    Random numbers that the model or the loss draws (dropout) are those of the seed, the round and the client, so that a
    client in a process of its own sends what it would send in a simulation.

    Args:
        model: With the weights of the server.
        dataset: The client's examples, at least one.
        work: What to do with them.
        loss: A function of the model and a batch, as the default collation makes it: the mean loss over the batch.
        seed: Of the run.
        round_number: The round; the order of the examples depends on it.
        client: The client's number; so does it.

    Returns:
        A tensor for each trainable parameter, by its name, in its dtype: a gradient, or weights before less after.

    Raises:
        InvalidData: The client has no example.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> data = torch.utils.data.TensorDataset(torch.tensor([[1.0], [3.0]]))
        >>> mean = lambda model, batch: model(batch[0]).mean()
        >>> client_message(model, data, LocalWork(), mean, seed=0, round_number=1, client=0)
        {'weight': tensor([[2.]])}
    """
    size = len(dataset)  # type: ignore[arg-type]
    if size == 0:
        raise InvalidData(f"client {client} has no example: give it one, or leave it out")
    own = copy.deepcopy(model)
    params = {name: param for name, param in own.named_parameters() if param.requires_grad}
    devices = sorted({param.device.index for param in params.values() if param.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed_for(seed, round_number, client) >> 1)
        if work.message == "gradient":
            return _gradient(own, params, dataset, work, loss)
        before = {name: param.detach().clone() for name, param in params.items()}
        for epoch in range(work.epochs):
            generator = torch.Generator().manual_seed(seed_for(seed, round_number, client, epoch) >> 1)
            for batch in batches(dataset, torch.randperm(size, generator=generator), work.batch_size):
                for param, grad in zip(params.values(), _grads(loss(own, batch), params), strict=True):
                    param.data.sub_(grad, alpha=work.lr)
        return {name: before[name] - param.detach() for name, param in params.items()}


def batches(dataset: Dataset[Any], order: Tensor, size: int) -> Iterator[Any]:
    """Cut a data set into batches: by indexing where it is made of tensors, else by the default collation.

    Args:
        dataset: A `TensorDataset`, a `Subset` of one, or any other with integer indices.
        order: Indices, shape (n,).
        size: Examples in each; the last may be smaller.

    Yields:
        The batches; of a `TensorDataset` a list of tensors.
    """
    for some in torch.split(order, size):
        if type(dataset) is TensorDataset:  # a subclass may do something else with an example
            yield [tensor[some] for tensor in dataset.tensors]
        elif type(dataset) is Subset and type(dataset.dataset) is TensorDataset:
            inner = torch.as_tensor(dataset.indices)[some]
            yield [tensor[inner] for tensor in dataset.dataset.tensors]
        else:
            yield default_collate([dataset[index] for index in some.tolist()])


def _gradient(
    model: nn.Module, params: dict[str, nn.Parameter], dataset: Dataset[Any], work: LocalWork, loss: Loss
) -> dict[str, Tensor]:
    """The gradient of the mean over all examples, from batches that memory holds, the last one by its true share."""
    size = len(dataset)  # type: ignore[arg-type]
    total = {name: torch.zeros_like(param, dtype=wide(param.dtype)) for name, param in params.items()}
    order = torch.arange(size)
    for some, batch in zip(torch.split(order, work.batch_size), batches(dataset, order, work.batch_size), strict=True):
        count = len(some)
        for sum_, grad in zip(total.values(), _grads(loss(model, batch), params), strict=True):
            sum_.add_(grad.to(sum_.dtype), alpha=count / size)
    return {name: tensor.detach().to(params[name].dtype) for name, tensor in total.items()}


def _grads(loss: Tensor, params: dict[str, nn.Parameter]) -> Sequence[Tensor]:
    return torch.autograd.grad(loss, list(params.values()), allow_unused=True, materialize_grads=True)
