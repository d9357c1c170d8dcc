"""The page of ``adadagrad detect``: what each policy reached, and the share of loss that small objects had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adadagrad.report.sheet import Curve, Sheet, chart
from adadagrad.report.table import Table

WINDOW = 20
"""Steps that a point of a curve averages."""


def detect_sheet(
    results: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], settings: Mapping[str, object]
) -> Sheet:
    """Return what the page holds.

    Args:
        results: One a policy.
        rows: One a step, with the policy's name.
        settings: All choices.

    Returns:
        The sheet.
    """
    tau = float(str(settings["tau"]))
    heads = ["policy", "AP small", "AP large", "stitched", f"steps with share below {tau:g}", "images read", "steps"]
    cells = []
    for one in results:
        shares = [row["share"] for row in rows if row["policy"] == one["policy"] and row["share"] is not None]
        starved = sum(share < tau for share in shares) / len(shares) if shares else None
        cells.append([
            one["policy"],
            f"{one['small']:.3f}",
            f"{one['large']:.3f}",
            f"{one['stitched']:.2f}",
            "-" if starved is None else f"{starved:.2f}",
            f"{one['images']:,}",
            str(one["steps"]),
        ])
    note = (
        "Average precision at IoU 0.5 on held-out scenes, one seed. A stitched batch reads four times the images of a "
        "regular one. The policy to beat is random stitching at the same share, not never."
    )
    names = [one["policy"] for one in results]
    return Sheet(
        title=f"Dynamic scale training: {', '.join(names)}",
        sentences=["Detectors of digits in scenes, of which few hold small digits; the policies differ alone in when "
                   "the next batch is made of shrunk scenes."],
        tables=[("What was reached", Table(headings=heads, cells=cells, notes=[note]))],
        figures=[
            chart(
                "share",
                "Share of box loss on small objects",
                f"Means over {WINDOW} steps. Near 0 small objects teach the detector nothing, near 1 large ones.",
                ("step", "share"),
                [_curve(name, rows, "share") for name in names],
            ),
            chart(
                "loss",
                "Loss",
                f"Means over {WINDOW} steps. Stitched batches hold more objects, and so another loss: curves of "
                "different policies do not compare.",
                ("step", "loss"),
                [_curve(name, rows, "loss") for name in names],
                spread=True,
            ),
        ],
        settings=settings,
    )  # fmt: skip


def _curve(name: str, rows: Sequence[Mapping[str, Any]], key: str) -> Curve:
    known = [(row["step"], row[key]) for row in rows if row["policy"] == name and row[key] is not None]
    groups = [known[start : start + WINDOW] for start in range(0, len(known), WINDOW)]
    return Curve(
        label=name,
        x=[sum(step for step, _ in group) / len(group) for group in groups],
        y=[sum(value for _, value in group) / len(group) for group in groups],
    )
