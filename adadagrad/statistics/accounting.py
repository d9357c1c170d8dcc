"""Who counts which parameter: rules where they account for its whole gradient, the fallback where they do not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from adadagrad.core.errors import InvalidMeasurement


class Accounting:
    """What the steps that verify have taught about one model.

    The first measured step verifies that the rules account for the whole gradient of every parameter; so do the
    second, third, fifth, ninth and so on, in case the model has come to use a weight in another way, and so does the
    step after one that failed.
    """

    def __init__(self) -> None:
        self.fallback: dict[str, nn.Parameter] = {}
        """Parameters that no rule counts, by qualified name."""
        self._announced: set[str] = set()
        self._verified: set[nn.Parameter] = set()
        self._measured = 0  # steps
        self._verify_next = True

    @property
    def due(self) -> bool:
        """Whether the next measured step verifies."""
        return self._verify_next or self._measured.bit_count() <= 1

    @property
    def measured(self) -> int:
        """Steps measured so far."""
        return self._measured

    def count_step(self) -> None:
        """Take note of a step that is measured."""
        self._measured += 1

    def doubt(self) -> None:
        """Let the next measured step verify, because something has failed."""
        self._verify_next = True

    def cover(
        self,
        parameters: Mapping[str, nn.Parameter],
        changed: set[nn.Parameter],
        counted: set[nn.Parameter],
        miscounted: Callable[[set[nn.Parameter]], set[nn.Parameter]],
        *,
        verify: bool,
    ) -> None:
        """See that every gradient of a micro-batch is counted; move what rules cannot count to the fallback.

        Args:
            parameters: The trainable parameters by name.
            changed: Those that received a gradient.
            counted: Those that rules have counted, in every one of their calls.
            miscounted: Returns those of some counted parameters whose calls do not add up to the gradient.
            verify: Whether it is asked.

        Raises:
            InvalidMeasurement: A parameter is not counted, and it is too late in the step to rerun the model for it.
        """
        if not verify and changed <= counted and changed <= self._verified:
            return
        ruled = changed - set(self.fallback.values())
        uncounted = ruled - counted
        if verify:
            uncounted |= miscounted(ruled - uncounted)
            self._verified |= ruled - uncounted
            self._verify_next = False
        names = {name: p for name, p in parameters.items() if p in uncounted | (ruled - self._verified)}
        if names and not verify:
            raise InvalidMeasurement(f"{', '.join(names)} received a gradient on a path that was not seen before")
        self.fallback.update(names)

    def announce(self, stacklevel: int) -> None:
        """Say once for each parameter that it is counted by a rerun, now that one has succeeded.

        Args:
            stacklevel: Frames between the warning and the line of the user's that it points at.
        """
        names = [name for name in self.fallback if name not in self._announced]
        self._announced.update(names)
        if names:
            warnings.warn(
                f"{', '.join(names)}: no rule counts this gradient, so the model is rerun example by example for it "
                "when it is measured: exact, but slower. MicroBatch() is an alternative",
                stacklevel=stacklevel + 1,
            )

    def state_dict(self, model: nn.Module) -> dict[str, Any]:
        """Return what was learnt, as plain lists, numbers and words.

        Args:
            model: The model, for the names of its parameters.
        """
        return {
            "measured": self._measured,
            "verify_next": self._verify_next,
            "verified": [name for name, p in model.named_parameters() if p in self._verified],
            "fallback": list(self.fallback),
        }

    @classmethod
    def of(cls, state: Mapping[str, Any], model: nn.Module) -> Accounting | None:
        """Return the accounting that a state describes, None if it names parameters that the model does not have.

        Args:
            state: What `state_dict` returned; anything else in it is left alone.
            model: The model.
        """
        parameters = dict(model.named_parameters())
        if not set(state["fallback"]) <= parameters.keys():
            return None
        accounting = cls()
        accounting.fallback = {name: parameters[name] for name in state["fallback"]}
        accounting._announced = set(state["fallback"])
        accounting._measured, accounting._verify_next = state["measured"], state["verify_next"]
        accounting._verified = {parameters[name] for name in state["verified"]}
        return accounting
