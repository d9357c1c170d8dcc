"""What the optimizers have in common: checked groups, one way through a step, state that loads bit for bit.

A method says which options it takes (`check`), and how the parameters of a group that have a gradient move (`update`).
`buckets` hands the maths lists of tensors on which torch's foreach operations work: those of one device and dtype
together, on a CPU cut into pieces that stay in the cache while one operation follows the other.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.shards import local_part
from adadagrad.core.vectors import HALVES

Numbers = Sequence[float] | Sequence[Tensor]
"""One number for each tensor: plain, or a scalar tensor where nothing may be read back from the device."""

PIECE = 1 << 17
"""Elements of a list that are worked on at a time on a CPU: half a megabyte of float32."""


class AbstractOptimizer(torch.optim.Optimizer, abc.ABC):
    """A `torch.optim.Optimizer` whose groups are checked before anything happens.

    Parameters without a gradient are left alone. State tensors of a parameter's shape are made by `torch.zeros_like`,
    and so are sharded where the parameter is; what works coordinate by coordinate is done on each rank's own part.

    Args:
        params: Parameters, named parameters or groups.
        defaults: Options by name, which a group may set for itself.

    Raises:
        InvalidArgument: An option is out of its range, or a parameter is complex or has no floating-point numbers.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)

    @abc.abstractmethod
    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options that are out of range, or contradict each other.

        Args:
            options: All options of a group.

        Raises:
            InvalidArgument: One is.
        """

    @abc.abstractmethod
    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Move some parameters of a group; without gradient tracking.

        Args:
            group: Their group.
            params: Those that have a gradient, at least one.
        """

    @property
    def no_mean(self) -> frozenset[str]:
        """Keys of the state that have no mean over ranks which train by themselves for a while; here none."""
        return frozenset()

    def check_parameter(self, param: Tensor, place: str) -> None:
        """Refuse a parameter that this method cannot train; here those that are not real.

        Args:
            param: The parameter.
            place: Which one it is, for the message.

        Raises:
            InvalidArgument: It is complex, or holds integers.
        """
        if param.is_complex():
            raise InvalidArgument(
                f"params must be real, got {param.dtype} for {place}: use torch.view_as_real on complex parameters"
            )
        if not param.is_floating_point():
            raise InvalidArgument(f"params must be floating-point tensors, got {param.dtype} for {place}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Args:
            param_group: ``params`` and any options that differ from the defaults.

        Raises:
            InvalidArgument: An option does not exist or is out of its range, or a parameter cannot be trained.
        """
        given = [name for name in param_group if name not in self.defaults and name not in ("params", "param_names")]
        if given:
            raise InvalidArgument(
                f"{type(self).__name__} has no option {given[0]}: known are {', '.join(sorted(self.defaults))}"
            )
        self.check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            for index, param in enumerate(self.param_groups[-1]["params"]):
                self.check_parameter(param, place_in_group(index, param))
        except InvalidArgument:
            del self.param_groups[-1]
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters that have a gradient; the others are left alone, also by weight decay.

        Args:
            closure: Evaluates the loss and its gradients first, where given.

        Returns:
            What the closure returned, None without one.

        Raises:
            InvalidArgument: A gradient is sparse; nothing has changed then.
        """
        loss = self.evaluate(closure)
        self.move()
        return loss

    def evaluate(self, closure: Callable[[], float] | None) -> float | None:
        """Evaluate a closure, and refuse what cannot be trained on.

        Args:
            closure: The user's, or None.

        Returns:
            What it returned.

        Raises:
            InvalidArgument: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for index, param in enumerate(group["params"]):
                if param.grad is not None and param.grad.layout != torch.strided:
                    raise InvalidArgument(
                        f"{type(self).__name__} needs dense gradients, got {param.grad.layout} for "
                        f"{place_in_group(index, param)}: set sparse=False in its embedding"
                    )
        return loss

    @torch.no_grad()
    def move(self) -> None:
        """Update all groups from the gradients that are there."""
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self.update(group, params)

    def named(self) -> list[tuple[str, Tensor]]:
        """Return all parameters with the names that they were given with, or with their numbers as names."""
        found: list[tuple[str, Tensor]] = []
        for group in self.param_groups:
            names = group.get("param_names") or [str(len(found) + i) for i in range(len(group["params"]))]
            found += zip(names, group["params"], strict=True)
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state, every tensor in the dtype in which it was saved.

        torch casts floating-point state to the parameter's dtype, and whole numbers with it. Here a float32 state of a
        bfloat16 parameter, and a table of indices, come back as they were. Tensors are copied.

        Args:
            state_dict: What `state_dict` returned, for parameters of the same shapes in the same order.
        """
        super().load_state_dict(dict(state_dict))
        params = [param for group in self.param_groups for param in group["params"]]
        for number, saved in state_dict["state"].items():
            param = params[number]
            for name, value in saved.items():
                if name == "step":
                    self.state[param][name] = self.state[param][name].clone()
                elif isinstance(value, Tensor):
                    self.state[param][name] = value.detach().to(param.device, copy=True)


def as_number(value: float | Tensor) -> float:
    """Read a scalar tensor, and leave anything else to the checks, which refuse a string that looks like a number.

    Args:
        value: A number, or a scalar tensor.

    Returns:
        The tensor's number; any other value as it is.

    Example:
        >>> as_number(torch.tensor(0.5)), as_number(2.0)
        (0.5, 2.0)
    """
    return float(value) if isinstance(value, Tensor) else value


def place_in_group(index: int, param: Tensor) -> str:
    """Say which parameter of its group one is.

    Args:
        index: From 0.
        param: The parameter.

    Returns:
        Its number and shape.
    """
    return f"parameter {index} of its group, of shape {tuple(param.shape)}"


def buckets(
    lists: Sequence[Sequence[Tensor]], numbers: Sequence[Numbers] = (), *, times: int = 1
) -> Iterator[tuple[list[list[Tensor]], list[Any]]]:
    """Cut parallel lists of tensors into lists for foreach operations that change them in place.

    Args:
        lists: Lists of equal length; the tensors of one place in them have one shape, device and dtype, and lie on
            ranks alike.
        numbers: Lists of numbers, one for each tensor.
        times: Pieces on a CPU are so many times `PIECE`: more than 1 where hardly anything but the lists is touched.

    Yields:
        The lists, of this rank's parts and in the storage of the tensors, and the numbers that belong to them.

    Example:
        >>> x, y = [torch.zeros(3), torch.zeros(2)], [torch.ones(3), torch.ones(2)]
        >>> for (xs, ys), (factors,) in buckets([x, y], [[2.0, 5.0]]):
        ...     _ = torch._foreach_add_(xs, torch._foreach_mul(ys, factors))
        >>> x
        [tensor([2., 2., 2.]), tensor([5., 5.])]
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[tuple[list[Tensor], list[Any]]]] = {}
    size = times * PIECE
    for index, column in enumerate(zip(*lists, strict=True)):
        parts = [local_part(tensor) for tensor in column]
        own = [some[index] for some in numbers]
        rows = kinds.setdefault((parts[0].device, parts[0].dtype), [])
        rows += ((some, own) for some in _pieces(parts, size))
    for rows in kinds.values():
        for some in _in_turn(rows, size):
            yield (
                [list(part) for part in zip(*(tensors for tensors, _ in some), strict=True)],
                [list(part) for part in zip(*(own for _, own in some), strict=True)],
            )


def _pieces(parts: list[Tensor], size: int) -> list[list[Tensor]]:
    """Cut a parameter's tensors into pieces of at most `size` elements, where they lie in a row on a CPU."""
    first = parts[0]
    if first.device.type != "cpu" or first.numel() <= size or not all(part.is_contiguous() for part in parts):
        return [parts]
    return [list(piece) for piece in zip(*(torch.split(part.view(-1), size) for part in parts), strict=True)]


def _in_turn(rows: list[tuple[list[Tensor], list[Any]]], size: int) -> Iterator[list[tuple[list[Tensor], list[Any]]]]:
    """Hand out everything at once on an accelerator, and a piece's worth at a time on a CPU."""
    if rows[0][0][0].device.type != "cpu":
        yield rows
        return
    taken: list[tuple[list[Tensor], list[Any]]] = []
    elements = 0
    for row in rows:
        taken.append(row)
        elements += row[0][0].numel()
        if elements >= size:
            yield taken
            taken, elements = [], 0
    if taken:
        yield taken


def multiply_(tensors: Sequence[Tensor], factors: float | Tensor | Numbers) -> None:
    """Multiply a list of tensors in place, by numbers that are exact.

    On a CPU torch's foreach multiplication first rounds a number to the tensors' kind, in which 0.999 is 1 and 0.99 is
    0.988 where that is bfloat16 (torch 2.13), and an average would not forget. Tensors one by one are multiplied right.

    Args:
        tensors: Of one device and dtype, at least one.
        factors: One for all, or one for each.

    Example:
        >>> x = torch.ones(2, dtype=torch.bfloat16)
        >>> multiply_([x], 0.992)
        >>> x[0].item()
        0.9921875
    """
    if tensors[0].dtype not in HALVES or tensors[0].device.type != "cpu":
        torch._foreach_mul_(list(tensors), factors)  # type: ignore[arg-type]
        return
    each = factors if isinstance(factors, Sequence) else [factors] * len(tensors)
    for tensor, factor in zip(tensors, each, strict=True):
        tensor.mul_(factor)


def add_quotients_(
    sums: Sequence[Tensor], numerators: Sequence[Tensor], divisors: Sequence[Tensor], factors: Sequence[Any]
) -> None:
    """Add factor * numerator / divisor to each sum, in one pass where nothing is lost by that.

    Args:
        sums: Changed; of one device and dtype.
        numerators: Left alone.
        divisors: Of the dtype of the numerators.
        factors: Numbers, or scalar tensors.
    """
    if sums[0].dtype not in HALVES and not any(isinstance(factor, Tensor) for factor in factors):
        torch._foreach_addcdiv_(list(sums), list(numerators), list(divisors), list(factors))
        return
    quotients = torch._foreach_div(list(numerators), list(divisors))
    multiply_(quotients, list(factors))
    torch._foreach_add_(list(sums), quotients)


def counted(steps: Sequence[Tensor], *, capturable: bool) -> Numbers:
    """Count a step for each parameter, and return the counts.

    Args:
        steps: Scalar tensors, which grow by 1.
        capturable: Whether nothing may be read back from the device: for CUDA graphs.

    Returns:
        The counts after this step: plain numbers, or tensors where `capturable` holds or the step is being compiled.
    """
    torch._foreach_add_(list(steps), 1.0)
    if capturable or torch.compiler.is_compiling():
        return list(steps)
    return [step.item() for step in steps]


def counter(param: Tensor, *, capturable: bool) -> Tensor:
    """Return a count of 0 for a parameter's steps: a scalar, on its device where `capturable` holds, else on the CPU.

    Args:
        param: The parameter.
        capturable: Whether nothing may be read back from the device.
    """
    return torch.zeros((), dtype=torch.float32, device=param.device if capturable else "cpu")
