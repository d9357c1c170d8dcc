"""One figure of the reliability battery: what was measured beside the bar that it must meet."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Literal

COMPARISONS = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A line of the battery's output.

    Args:
        test: Number of the test in docs/reliability.md, 1 to 27.
        name: What was measured, in a few words, with its conditions.
        value: The figure.
        comparison: How it must stand to the bar.
        bar: The bar.
    """

    test: int
    name: str
    value: float
    bar: float
    comparison: Literal["<=", ">=", "=="] = "<="

    @property
    def passed(self) -> bool:
        """Whether the bar is met; a NaN meets none."""
        return bool(COMPARISONS[self.comparison](self.value, self.bar))

    def line(self) -> str:
        """Return the figure as one line of text."""
        verdict = "ok  " if self.passed else "FAIL"
        return f"{verdict} {self.test:2d}  {self.value:<12.6g} {self.comparison} {self.bar:<10.6g} {self.name}"
