"""The ways to measure that benchmarks/rivals.py compares: how each is warmed up, read and checked."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adadagrad as ada
from adadagrad.statistics.examples import Examples
from benchmarks.models import GPT, MODELS, Workload
from benchmarks.rival_steps import Made, Step, backpack_extension, metered, opacus_ghost, opacus_samples, vmapped

EXAMPLES = 16


class BatchedPositions(GPT):
    """The language model with position numbers of shape (n, T): for packages whose first dimension is the batch."""

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits that `GPT` returns."""
        positions = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
        x = self.tokens(ids) + self.positions(positions)
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)


REWRITTEN = {"gpt": replace(MODELS["gpt"], build=BatchedPositions)}


def recorded_norms(step: Step) -> Tensor:
    """Run a step of `PerExample` on equal weights and return its |g_i|^2, read where they are formed."""
    seen: list[Tensor] = []
    square_norms = Examples.square_norms

    def reading(examples: Examples) -> Tensor:
        seen.append(square_norms(examples))
        return seen[-1]

    with patch.object(Examples, "square_norms", reading):
        step()
    found = torch.cat(seen)
    return found * len(found) ** 2


@dataclass(frozen=True)
class Method:
    """A way to measure, and how its result is read.

    Args:
        make: Makes a model and its step from a workload, inputs and targets.
        read: Runs the step and returns |g_i|^2 (n,), or V.
        warm_up: Steps before any is timed or read.
        variance: Whether `read` returns V.
    """

    make: Callable[[Workload, Tensor, Tensor], Made]
    read: Callable[[Step], Any] = lambda step: step()
    warm_up: int = 2
    variance: bool = False


# One of our estimators more is one line more: the first measured steps verify, and so do steps 5 and 9, rarely met
# later. An estimator whose norms are not exact is read as V: read=lambda step: step().variance_trace, variance=True.
OURS = {
    "PerExample": Method(partial(metered, ada.PerExample()), recorded_norms, warm_up=9),
    "Probe(probes=4)": Method(
        partial(metered, ada.Probe(probes=4)), lambda step: step().variance_trace, warm_up=9, variance=True
    ),
}
RIVALS = {
    "Opacus ghost": Method(opacus_ghost),
    "BackPACK L2": Method(partial(backpack_extension, "BatchL2Grad")),
    "BackPACK variance": Method(partial(backpack_extension, "Variance"), variance=True),
    "Opacus samples": Method(opacus_samples),
    "vmap": Method(vmapped),
}


class Unsupported(Exception):
    """A method cannot measure a model.

    Args:
        cell: What the table says.
        reason: The first thing that went wrong.
    """

    def __init__(self, cell: str, reason: str) -> None:
        super().__init__(reason)
        self.cell = cell


def exact_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return every example's gradient, by a loop in float64: shape (n, number of parameters)."""
    wide = copy.deepcopy(model).double()
    rows = []
    for i in range(len(x)):
        loss = F.cross_entropy(wide(x[i : i + 1].double() if x.is_floating_point() else x[i : i + 1]), y[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(wide.parameters()))]))
    return torch.stack(rows)


def error(method: Method, work: Workload, x: Tensor, y: Tensor) -> float:
    """Return a method's largest relative error over the first 16 examples.

    Args:
        method: What measures.
        work: On which model.
        x: The batch, of which a method that returns V sees the first 16 examples alone.
        y: Its targets.

    Returns:
        Relative error of |g_i|^2, or of V.
    """
    few_x, few_y = x[:EXAMPLES], y[:EXAMPLES]
    model, step = method.make(work, few_x, few_y) if method.variance else method.make(work, x, y)
    for _ in range(method.warm_up):
        step()
    bare, _ = work.fresh()
    bare.load_state_dict(model.state_dict())
    gradients = exact_gradients(bare, few_x, few_y)
    found = method.read(step)
    if method.variance:
        return abs(float(found) / ada.statistics_from_units(gradients).variance_trace - 1)
    return float((found[: len(few_x)].double() / gradients.square().sum(1) - 1).abs().max())


def attempt(method: Method, work: Workload, x: Tensor, y: Tensor) -> tuple[Step, float]:
    """Return a method's step, warmed up, and its error.

    Raises:
        Unsupported: It failed; with the reason.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = error(method, work, x, y)
            _, step = method.make(work, x, y)
            for _ in range(method.warm_up):
                step()
        except ModuleNotFoundError as problem:
            raise Unsupported("not installed: make rivals", str(problem)) from problem
        except Exception as problem:  # whatever a package raises is the reason
            matches = (re.search(r"extension for Module <class '(\S+)'>", str(w.message)) for w in caught)
            missing = {match[1] for match in matches if match}
            reason = f"{type(problem).__name__}: {problem}".splitlines()[0]
            said = [f"without an extension: {', '.join(sorted(missing))}"] if missing else []
            raise Unsupported("not supported", "; ".join([reason, *said])) from problem
    return step, found
