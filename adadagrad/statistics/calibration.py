"""How it is found where the examples are: trial runs before the first measured forward.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks

from adadagrad.core.errors import AdadagradError, BatchCoupledModule, InvalidMeasurement
from adadagrad.statistics.broadcast import CallKey
from adadagrad.statistics.calls import NESTED
from adadagrad.statistics.layer_costs import LayerSize
from adadagrad.statistics.layer_sizes import size_of_call, size_of_whole_call
from adadagrad.statistics.layout import EVERY, Layout
from adadagrad.statistics.meetings import find_meetings
from adadagrad.statistics.places import PlaceTrials
from adadagrad.statistics.trials import Fingerprint, agree, grown_dim, rows_to_try, select, untouched

Forward: TypeAlias = Callable[[int, Any, dict[str, Any]], Any]
"""Runs the model on so many examples, given arguments and keyword arguments."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """One layer call of one trial run: shapes of input and output, and the input's rows in brief."""

    x: torch.Size
    y: torch.Size
    rows: dict[int, Fingerprint]


class Calibration:
    """The trial runs before one forward; each layer call in them must come to `note` or `note_whole`.

    Args:
        model: The model, for its buffers and devices.
        layout: Where the findings go.
        aligned: Whether other ranks make the same runs: then there are three, whatever the examples and the model are,
            and none with a graph, which would call on the others in its backward.
    """

    def __init__(self, model: nn.Module, layout: Layout, *, aligned: bool = False) -> None:
        self._model, self._layout, self._aligned = model, layout, aligned
        self._places = PlaceTrials()
        self._run: dict[CallKey, _Seen] = {}  # of the run in progress, as the others
        self._sizes: dict[CallKey, LayerSize] = {}
        self._nodes: dict[CallKey, tuple[Node | None, torch.Size]] = {}

    def note(self, key: CallKey, layer: nn.Module, x: Tensor, y: Tensor, rows: int) -> None:
        """Take in one layer call of a trial run.

        Args:
            key: Name and call number.
            layer: The module.
            x: Its input.
            y: Its output.
            rows: Examples in this run.
        """
        _refuse_nested(x, y)
        prints = {dim: Fingerprint.of(x, dim) for dim, size in enumerate(x.shape) if size == rows}
        self._run[key] = _Seen(x.shape, y.shape, prints)
        self._nodes[key] = (y.grad_fn, y.shape)
        self._sizes[key] = size_of_call(layer, x, y)

    def note_whole(
        self, key: CallKey, layer: nn.Module, arguments: Sequence[Any], outputs: Sequence[Any], rows: int
    ) -> None:
        """Take in one call of several tensors in a trial run.

        Args:
            key: Name and call number.
            layer: The module.
            arguments: Its arguments, tensors and others.
            outputs: Its outputs, likewise.
            rows: Examples in this run.
        """
        _refuse_nested(*arguments, *outputs)
        self._places.note(key, arguments, outputs, rows)
        self._sizes[key] = size_of_whole_call(layer, arguments, outputs, rows)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def run(self, forward: Forward, args: Any, kwargs: Any, n: int, raw: Mapping[nn.Parameter, CallKey]) -> None:
        """Make the trial runs; each layer call in them must come to `note` or `note_whole`.

        Args:
            forward: Runs the model on so many examples, given arguments and keyword arguments.
            args: Its positional arguments, with n examples.
            kwargs: Its keyword arguments.
            n: Number of examples.
            raw: Parameters that no layer with a rule owns, with their keys.

        Raises:
            InvalidMeasurement: The model does not run on these examples, or makes nested tensors of them.
            BatchCoupledModule: An example's output depends on another example.
            AdadagradError: Whatever of this `note` or `note_whole` has raised.
        """
        m, other = rows_to_try((args, kwargs), n)
        extras = [[0], [0 if other is None else other], [0, 0]]
        if other is None and not self._aligned:
            del extras[1]
        outputs, runs = [], []
        for extra in extras:
            self._run, self._sizes = {}, {}
            self._places.start_run()
            rows = [*range(m), *extra]
            some_args, some_kwargs = select((args, kwargs), n, rows)
            try:
                with untouched(self._model), torch.no_grad():
                    outputs.append(forward(len(rows), some_args, some_kwargs))
            except AdadagradError:
                raise
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
        dims: dict[CallKey, tuple[int, int] | None] = {}
        short, longer = (Counter(name for name, _ in run) for run in (runs[0], runs[-1]))
        for name in short.keys() & longer.keys():
            if short[name] != longer[name]:
                dims[name, EVERY] = None
        for key, seen in runs[0].items():
            if key in runs[-1]:
                dims[key] = _batch_dims(seen, runs[1].get(key), runs[-1][key], m)
        places = self._places.conclude(m)
        known = {**self._layout.dims, **dims}
        shared = {key for key in self._run if known.get(key, (0, 0)) is None}
        if (raw or shared) and not self._aligned:
            self._meet(forward, (args, kwargs), n, m, raw, shared)
        self._layout.found(dims, places, self._sizes, compared=other is not None)

    def _meet(
        self,
        forward: Forward,
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
            # A checkpoint around the model must not take what the trial saves for its own. What is saved is detached:
            # an output that its own node saves would else keep the graph, and itself, forever.
            with untouched(self._model), torch.enable_grad(), saved_tensors_hooks(Tensor.detach, _itself):
                output = forward(len(rows), args, kwargs)
            return output, {
                node: (key, shape) for key, (node, shape) in self._nodes.items() if node is not None and key in shared
            }

        with contextlib.suppress(Exception):
            self._layout.meetings.update(find_meetings(run, raw, m))


def _refuse_nested(*values: Any) -> None:
    if any(isinstance(value, Tensor) and value.is_nested for value in values):
        raise InvalidMeasurement(NESTED)


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
