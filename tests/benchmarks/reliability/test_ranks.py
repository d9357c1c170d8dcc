"""The reduced form of the battery's ranks figures meets its bars."""

from __future__ import annotations

from benchmarks.reliability.ranks import figures


def test_every_figure_meets_its_bar() -> None:
    found = list(figures(reduced=True))
    assert len(found) > 4
    assert [figure.line() for figure in found if not figure.passed] == []
