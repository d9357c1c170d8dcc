"""What the backward of one measured micro-batch brings, layer call by layer call."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from adadagrad.core.errors import InvalidMeasurement
from adadagrad.statistics.calls import CREATE_GRAPH, NESTED, SEVERAL_BACKWARDS, KeptCall, LayerCall
from adadagrad.statistics.rules.whole import RecordedCall


class Intake:
    """Takes in every call's output gradient, and delivers its squares or keeps the call for later.

    Args:
        keep: Keep every call's tensors, for inner products or coordinates, also where its squares are delivered.
        square: Add up squared coordinates where a fused rule forms gradients.
        verify: Keep them all and deliver nothing through the leaf: a parameter may turn out to be the fallback's.
    """

    def __init__(self, *, keep: bool, square: bool, verify: bool) -> None:
        self.square = square
        """Whether fused rules add up squared coordinates."""
        self.kept: list[KeptCall] = []
        self.counted: set[nn.Parameter] = set()
        """Parameters of calls whose squares were delivered, or that were kept."""
        self.delivered = False
        """Whether any squares went through the leaf."""
        self.failure: Exception | None = None
        self.seconds = 0.0
        """Time spent in taps and trial runs."""
        self.uses: dict[nn.Parameter, int] = {}
        """Calls per parameter in this micro-batch."""
        self._keep, self._verify, self._open = keep, verify, True
        self._fired: set[LayerCall | RecordedCall] = set()

    @property
    def started(self) -> bool:
        """Whether a backward has begun to arrive."""
        return bool(self._fired)

    @property
    def listening(self) -> bool:
        """Whether what arrives is taken in: the micro-batch goes on, and nothing has failed."""
        return self._open and self.failure is None

    def count_use(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take note of a call in the forward.

        Args:
            parameters: The call's.
        """
        for p in parameters:
            self.uses[p] = self.uses.get(p, 0) + 1

    def fail(self, error: Exception) -> None:
        """Say why there will be no statistic; taps then let gradients pass.

        Args:
            error: The reason.
        """
        self.failure = error

    def close(self) -> None:
        """Stop listening: graphs that outlive the micro-batch deliver nothing."""
        self._open = False

    def keep(self, entry: KeptCall) -> None:
        """Take in a call whose examples were found after the backward.

        Args:
            entry: The call.
        """
        self.kept.append(entry)
        self.counted.update(entry.call.parameters.values())

    def admit(self, call: LayerCall | RecordedCall, name: str, *, intact: bool) -> None:
        """Take note that the backward has come to a call.

        Args:
            call: The call.
            name: The layer's name.
            intact: Whether what was kept of its input is still what it was.

        Raises:
            InvalidMeasurement: It cannot be measured in this backward.
        """
        if torch.is_grad_enabled():
            raise InvalidMeasurement(CREATE_GRAPH)
        if call in self._fired:
            raise InvalidMeasurement(SEVERAL_BACKWARDS)
        if not intact:
            raise InvalidMeasurement(f"the input of {name} was changed in place after the call")
        self._fired.add(call)

    def collect(
        self,
        call: LayerCall | None,
        x: Tensor | None,
        gy: Tensor,
        squares: Tensor | None = None,
        seconds: float = 0.0,
    ) -> Tensor | None:
        """Take in one call during the backward; never raises.

        Args:
            call: The call, None where its examples are not known.
            x: What was kept of its input; None if that was changed in place.
            gy: Gradient of its output.
            squares: Its squared norms, float64 (n,), where a fused rule has formed them.
            seconds: Time that these took.

        Returns:
            Its share of the leaf's gradient, float64 (n,) [grad^2], or None.
        """
        if call is None or not self.listening:
            return None
        started = time.perf_counter()
        try:
            return self._take_in(call, x, gy, squares)
        except Exception as error:  # a failing measurement must never harm the backward it rides on
            self.failure = error
            return None
        finally:
            self.seconds += time.perf_counter() - started + seconds + call.square_sums.seconds

    def _take_in(self, call: LayerCall, x: Tensor | None, gy: Tensor, squares: Tensor | None) -> Tensor | None:
        """Keep the call if it is needed later; return the squares of parameters that need not wait for other calls."""
        self.admit(call, call.name, intact=x is not None)
        assert x is not None
        if gy.is_nested:
            raise InvalidMeasurement(NESTED)
        self.counted.update(call.parameters.values())
        if call.dims != (0, 0):
            x, gy = x.movedim(call.dims[0], 0), gy.movedim(call.dims[1], 0)
        if x.dtype != gy.dtype and x.is_floating_point():
            x = x.to(gy.dtype)
        late = {name for name, p in call.parameters.items() if self._verify or self.uses.get(p, 0) > 1}
        if late or self._keep:
            self.kept.append(KeptCall(call, x, gy, frozenset(late)))
        prompt = call.parameters.keys() - late
        self.delivered |= bool(prompt)
        if not prompt:
            return None
        return call.rule.square_norms(call.layer, x, gy, prompt) if squares is None or late else squares
