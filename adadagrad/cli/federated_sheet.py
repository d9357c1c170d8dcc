"""The page of ``adadagrad federated``: accuracy, what the server heard, and the estimate of the noise's tail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adadagrad.cli.federated_arguments import FederatedCommand
from adadagrad.cli.outcome import choices
from adadagrad.report.sheet import Curve, Sheet, chart
from adadagrad.report.table import Table


def federated_sheet(command: FederatedCommand, rows: Sequence[dict[str, Any]]) -> Sheet:
    """Return what the page of a run holds.

    Args:
        command: What the user chose.
        rows: One a round, at least one.

    Returns:
        The sheet.
    """
    evaluated = [row for row in rows if row["accuracy"] is not None]
    heard = [row for row in rows if row["grad_norm"]]
    rounds, accuracy = [row["round"] for row in evaluated], [row["accuracy"] for row in evaluated]
    figures = [
        chart(
            "accuracy",
            "Accuracy on held-out data",
            "Under heavy-tailed noise a single round can undo many: look for falls, not only at the last value.",
            ("round", "accuracy"),
            [Curve(label=command.server.server, x=rounds, y=accuracy)],
        )
    ]
    if heard:
        norms = Curve(label="norm", x=[row["round"] for row in heard], y=[row["grad_norm"] for row in heard])
        reading = "Peaks are rounds in which the channel's noise drowned the clients."
        figures.append(
            chart("heard", "Norm of what the server heard", reading, ("round", "norm"), [norms], spread=True)
        )
    tailed = [row for row in rows if row["tail_index"] is not None]
    if tailed:
        index = Curve(label="estimate", x=[row["round"] for row in tailed], y=[row["tail_index"] for row in tailed])
        reading = f"From differences of successive rounds; the channel's own is {command.channel.tail_index}."
        figures.append(chart("tail", "Estimated tail index", reading, ("round", "tail index"), [index]))
    lost = sum(len(row["left_out"]) for row in rows)
    cells = [str(len(rows)), f"{accuracy[-1]:.3f}", f"{max(accuracy):.3f}", str(lost)]
    table = Table(headings=["rounds", "last accuracy", "best", "answers left out"], cells=[cells], notes=[])
    return Sheet(
        title=f"{command.problem.model} on {command.problem.data}, {command.problem.clients} clients over the air",
        sentences=[f"Server step {command.server.server}, tail index of the channel {command.channel.tail_index}."],
        tables=[("What was reached", table)],
        figures=figures,
        settings=choices(command),
    )
