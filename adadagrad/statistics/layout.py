"""Where the examples are: which dimension of every layer's input and output is the batch, as the trial runs found it.

`calibration.py` makes the runs; here is what is remembered of them, and asked at every call of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

from torch import Tensor

from adadagrad.statistics.broadcast import CallKey, Meeting
from adadagrad.statistics.layer_costs import LayerSize
from adadagrad.statistics.places import Dims, Places, first_dims

EVERY = -1
"""In the place of a call number: all calls of a module whose number of calls depends on the number of examples."""


@dataclass(slots=True)
class Layout:
    """What the trial runs found. Calls of earlier trial runs stay known, so that a model may alternate its paths.

    Args:
        sizes: What the cost model needs of every call of the latest trial runs.
        dims: Batch dimensions of input and output of every call, None for a call shared by all examples.
        places: The same for calls of several tensors.
        meetings: Where the output of such a call, or a parameter of no layer, is broadcast over the examples.
        calibrated: Whether the trial runs have been made for the present path.
        compared: Whether they had two different examples, so that mixing would have been seen.
    """

    sizes: dict[CallKey, LayerSize] = field(default_factory=dict)
    dims: dict[CallKey, tuple[int, int] | None] = field(default_factory=dict)
    places: Places = field(default_factory=Places)
    meetings: dict[CallKey, tuple[Meeting, ...]] = field(default_factory=dict)
    calibrated: bool = False
    compared: bool = False
    _first: dict[str, bool] = field(default_factory=dict)

    def due(self, n: int) -> bool:
        """Return whether trial runs are needed before a forward of n examples."""
        return not self.calibrated or (not self.compared and n > 1)

    def examples_first(self, name: str) -> bool:
        """Return whether every known call of a module has its examples in the first dimension of input and output."""
        found = self._first.get(name)
        if found is None:
            known = [dims for (other, _), dims in self.dims.items() if other == name]
            found = self._first[name] = bool(known) and all(dims == (0, 0) for dims in known)
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

    def whole_dims(self, key: CallKey, arguments: Sequence[Any], outputs: Sequence[Any], n: int) -> Dims | None:
        """Return the batch dimensions of a call of several tensors, None where it cannot be taken apart.

        Args:
            key: Name and call number.
            arguments: Its arguments, tensors and others.
            outputs: Its outputs, likewise.
            n: Examples in this forward.

        Returns:
            A dimension for each argument and output, or None.

        Raises:
            KeyError: The trial runs did not see this call, or saw it with other dimensions.
        """
        return self.places.find(key, arguments, outputs, n) if self.calibrated else first_dims(arguments, outputs, n)

    def found(
        self,
        dims: dict[CallKey, tuple[int, int] | None],
        places: dict[CallKey, Dims | None],
        sizes: dict[CallKey, LayerSize],
        *,
        compared: bool,
    ) -> None:
        """Take in what trial runs found, beside what earlier ones did.

        Args:
            dims: Batch dimensions of the calls that they saw.
            places: The same for calls of several tensors.
            sizes: Sizes of all these calls.
            compared: Whether they had two different examples.
        """
        self.dims.update(dims)
        self.places.dims.update(places)
        self.sizes, self.calibrated, self.compared = sizes, True, compared
        self._first.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return everything found, as plain lists, numbers and words."""
        return {
            "calibrated": self.calibrated,
            "compared": self.compared,
            "dims": [[name, index, *(dims or (-1, -1))] for (name, index), dims in self.dims.items()],
            "meetings": [
                [name, index, [[meeting.kind, meeting.operand, meeting.dim] for meeting in meetings]]
                for (name, index), meetings in self.meetings.items()
            ],
            "places": self.places.state(),
            "sizes": [[name, index, *astuple(size)] for (name, index), size in self.sizes.items()],
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Layout:
        """Return the layout that another one's state describes.

        Args:
            state: What `state_dict` returned; anything else in it is left alone.

        Returns:
            A layout of its own.
        """
        layout = cls(calibrated=state["calibrated"], compared=state["compared"])
        for name, index, x, y in state["dims"]:
            layout.dims[name, index] = None if x < 0 else (x, y)
        layout.places.take(state.get("places", ()))
        for name, index, meetings in state["meetings"]:
            layout.meetings[name, index] = tuple(Meeting(*meeting) for meeting in meetings)
        for name, index, *size in state["sizes"]:
            layout.sizes[name, index] = LayerSize(*size)
        return layout
