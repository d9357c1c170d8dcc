r"""Where the examples are: which dimension of every layer's input and output is the batch.

A layer whose input happens to have n rows need not have n examples: position ids ``arange(T)`` with T = n look
just like a batch, and taking their rows for examples gives wrong numbers without an error. So before the first
measured forward the model makes three trial runs on a few examples (`trials.py`): on m + 1, on m + 1 of which
the last is another one, and on m + 2. A dimension that grows from m + 1 to m + 2 is the batch. A layer where
none grows is shared by all examples; so is one whose first m rows change with the last example, because the
model has put the examples in another order there (sorted them by length, say). Where something is shared, two more
runs find where it meets the examples (`meetings.py`).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks

from adadagrad.core.errors import BatchCoupledModule, InvalidMeasurement
from adadagrad.statistics.broadcast import CallKey, Meeting
from adadagrad.statistics.meetings import find_meetings
from adadagrad.statistics.planner import LayerSize
from adadagrad.statistics.trials import Fingerprint, agree, grown_dim, rows_to_try, select, untouched

EVERY = -1
"""In the place of a call number: all calls of a module whose number of calls depends on the number of examples."""

_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose cost is that of a matrix product."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """One layer call of one trial run: shapes of input and output, and the input's rows in brief."""

    x: torch.Size
    y: torch.Size
    rows: dict[int, Fingerprint]


@dataclass(slots=True)
class Layout:
    """What the trial runs found. Calls of earlier trial runs stay known, so that a model may alternate its paths.

    Args:
        sizes: What the cost model needs of every call of the latest trial runs.
        dims: Batch dimensions of input and output of every call, None for a call shared by all examples.
        meetings: Where the output of such a call, or a parameter of no layer, is broadcast over the examples.
        calibrated: Whether the trial runs have been made for the present path.
        compared: Whether they had two different examples, so that mixing would have been seen.
    """

    sizes: dict[CallKey, LayerSize] = field(default_factory=dict)
    dims: dict[CallKey, tuple[int, int] | None] = field(default_factory=dict)
    meetings: dict[CallKey, tuple[Meeting, ...]] = field(default_factory=dict)
    calibrated: bool = False
    compared: bool = False
    first: dict[str, bool] = field(default_factory=dict)
    _run: dict[CallKey, _Seen] = field(default_factory=dict)
    _run_sizes: dict[CallKey, LayerSize] = field(default_factory=dict)
    _nodes: dict[CallKey, tuple[Node | None, torch.Size]] = field(default_factory=dict)

    def due(self, n: int) -> bool:
        """Return whether trial runs are needed before a forward of n examples."""
        return not self.calibrated or (not self.compared and n > 1)

    def examples_first(self, name: str) -> bool:
        """Return whether every known call of a module has its examples in the first dimension of input and output."""
        found = self.first.get(name)
        if found is None:
            known = [dims for (other, _), dims in self.dims.items() if other == name]
            found = self.first[name] = bool(known) and all(dims == (0, 0) for dims in known)
        return found

    def batch_dims(self, key: CallKey, x: Tensor, y: Tensor, n: int) -> tuple[int, int] | None:
        """Return the batch dimensions of a call's input and output, None where it has none.

        Args:
            key: Name and call number.
            x: The input.
            y: The output.
            n: Examples in this forward.

        Returns:
            Two dimensions, or None for a call that is shared by all examples.

        Raises:
            KeyError: The trial runs did not see this call, or saw it with other dimensions.
        """
        if not self.calibrated:
            return (0, 0) if x.shape[:1] == y.shape[:1] == (n,) else None
        dims = self.dims[key] if (key[0], EVERY) not in self.dims else None
        if dims is None:
            return None
        if max(dims[0] - x.dim(), dims[1] - y.dim()) >= 0 or (x.shape[dims[0]], y.shape[dims[1]]) != (n, n):
            raise KeyError(key)
        return dims

    def note(self, key: CallKey, layer: nn.Module, x: Tensor, y: Tensor, rows: int) -> None:
        """Take in one layer call of a trial run.

        Args:
            key: Name and call number.
            layer: The module.
            x: Its input.
            y: Its output.
            rows: Examples in this run.
        """
        prints = {dim: Fingerprint.of(x, dim) for dim, size in enumerate(x.shape) if size == rows}
        self._run[key] = _Seen(x.shape, y.shape, prints)
        self._nodes[key] = (y.grad_fn, y.shape)
        weights = sum(p.numel() for p in layer.parameters(recurse=False) if p.requires_grad and p.dim() > 1)
        channels = layer.weight.shape[0] if isinstance(layer, _PRODUCTS) else 1
        rows = max(1, y.shape[0]) if y.dim() else 1
        positions = max(1, y.numel() // (rows * channels))
        activations = (x.numel() + y.numel()) // rows
        self._run_sizes[key] = LayerSize(weights if isinstance(layer, _PRODUCTS) else 0, positions, activations)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def calibrate(
        self,
        model: nn.Module,
        forward: Callable[[int, Any, dict[str, Any]], Any],
        args: Any,
        kwargs: Any,
        n: int,
        raw: Mapping[nn.Parameter, CallKey],
    ) -> None:
        """Make the trial runs; each layer call in them must come to `note`.

        Args:
            model: The model, for its buffers and devices.
            forward: Runs the model on so many examples, given arguments and keyword arguments.
            args: Its positional arguments, with n examples.
            kwargs: Its keyword arguments.
            n: Number of examples.
            raw: Parameters that no layer with a rule owns, with their keys.

        Raises:
            InvalidMeasurement: The model does not run on these examples.
            BatchCoupledModule: An example's output depends on another example.
        """
        m, other = rows_to_try((args, kwargs), n)
        extras = ([0], [other], [0, 0]) if other is not None else ([0], [0, 0])
        outputs, runs = [], []
        for extra in extras:
            self._run, self._run_sizes = {}, {}
            rows = [*range(m), *extra]
            some_args, some_kwargs = select((args, kwargs), n, rows)
            try:
                with untouched(model), torch.no_grad():
                    outputs.append(forward(len(rows), some_args, some_kwargs))
            except Exception as error:
                raise InvalidMeasurement(
                    f"the batch dimension could not be found: the model fails on {len(rows)} examples made from a "
                    f"batch of {n} ({error}). Use PerExample(calibrate=False) if the first dimension of every "
                    "layer's input and output is the batch, or MicroBatch()"
                ) from error
            runs.append(self._run)
        if other is not None and not agree(outputs[0], outputs[1], m):
            raise BatchCoupledModule(
                "an example's output depends on the other examples of its batch, so a per-example gradient does "
                "not exist; use estimator=MicroBatch()"
            )
        short, longer = (Counter(name for name, _ in run) for run in (runs[0], runs[-1]))
        for name in short.keys() & longer.keys():
            if short[name] != longer[name]:
                self.dims[name, EVERY] = None
        for key, seen in runs[0].items():
            if key in runs[-1]:
                self.dims[key] = _batch_dims(seen, runs[1].get(key), runs[-1][key], m)
        self.first.clear()
        self.sizes = self._run_sizes
        shared = {key for key, dims in self.dims.items() if dims is None and key in self._run}
        if raw or shared:
            self._meet(model, forward, (args, kwargs), n, m, raw, shared)
        self._run, self._run_sizes, self._nodes = {}, {}, {}
        self.calibrated, self.compared = True, other is not None

    def _meet(
        self,
        model: nn.Module,
        forward: Callable[[int, Any, dict[str, Any]], Any],
        arguments: Any,
        n: int,
        m: int,
        raw: Mapping[nn.Parameter, CallKey],
        shared: set[CallKey],
    ) -> None:
        """Find where shared tensors meet the examples; what cannot be found is left to the fallback."""

        def run(rows: list[int]) -> tuple[Any, dict[Node, tuple[CallKey, torch.Size]]]:
            self._nodes = {}
            args, kwargs = select(arguments, n, rows)
            # A checkpoint around the model must not take what the trial saves for its own.
            with untouched(model), torch.enable_grad(), saved_tensors_hooks(_itself, _itself):
                output = forward(len(rows), args, kwargs)
            return output, {
                node: (key, shape) for key, (node, shape) in self._nodes.items() if node is not None and key in shared
            }

        with contextlib.suppress(Exception):
            self.meetings.update(find_meetings(run, raw, m))


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _batch_dims(first: _Seen, second: _Seen | None, longer: _Seen, m: int) -> tuple[int, int] | None:
    """Return the batch dimensions of a call seen in all runs; None if the examples do not lie there in order."""
    x, y = grown_dim(first.x, longer.x, m + 1), grown_dim(first.y, longer.y, m + 1)
    if x is None or y is None:
        return None
    if second is not None and second.x == first.x and not first.rows[x].agrees(second.rows[x], m):
        return None
    return x, y
