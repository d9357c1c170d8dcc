"""The comparison table: one row a run, what it cost and what it reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adadagrad.report.run import CUT, Run, accuracy_metric, metric_title


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run in numbers.

    Args:
        name: The run's name.
        steps: Applied optimizer steps.
        mean_batch_size: Examples per step on average over steps; None before the first step.
        last_batch_size: Examples of the last step that had its planned size; None before the first step.
        samples: Examples whose update was applied.
        seconds: Training time, evaluation left out.
        measure_seconds: The part of it spent measuring noise.
        best_accuracy: The highest logged accuracy, between 0 and 1; None where none was logged.
        last_accuracy: The last logged accuracy.
    """

    name: str
    steps: int
    mean_batch_size: float | None
    last_batch_size: int | None
    samples: int
    seconds: float
    measure_seconds: float
    best_accuracy: float | None
    last_accuracy: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The table as text: headings and cells, and what the reader should know of single runs."""

    headings: list[str]
    cells: list[list[str]]
    notes: list[str]


def summarize(run: Run, metric: str | None = "val/accuracy") -> Row:
    """Reduce one run to its row.

    Args:
        run: The run.
        metric: The accuracy's name in the log.

    Returns:
        The row.
    """
    sizes = [step.global_batch_size for step in run.steps]
    values = [value for _, value in run.series(metric)] if metric else []
    return Row(
        name=run.name,
        steps=len(sizes),
        mean_batch_size=sum(sizes) / len(sizes) if sizes else None,
        last_batch_size=_last_planned(run, sizes),
        samples=run.steps[-1].samples_seen if run.steps else 0,
        seconds=run.steps[-1].seconds if run.steps else 0.0,
        measure_seconds=next((s.measure_seconds for s in reversed(run.steps) if s.measure_seconds is not None), 0.0),
        best_accuracy=max(values, default=None),
        last_accuracy=values[-1] if values else None,
    )


def comparison_table(runs: Sequence[Run]) -> Table:
    """Put runs side by side.

    Args:
        runs: At least one run.

    Returns:
        The table, a row for each run in the order given.
    """
    metric = accuracy_metric(runs)
    title = metric_title(metric) if metric else "accuracy"
    headings = [
        "run",
        "steps",
        "mean batch",
        "last batch",
        "samples",
        "seconds",
        "of which measuring",
        f"best {title}",
        f"last {title}",
    ]
    rows = [summarize(run, metric) for run in runs]
    return Table(
        headings=headings,
        cells=[_cells(row) for row in rows],
        notes=[note for run in runs for note in _notes(run, metric)],
    )


def table_text(table: Table) -> str:
    """Lay the table out for a terminal, numbers flush right, a heading's words above each other to fit 80 columns.

    Args:
        table: From `comparison_table`.

    Returns:
        Lines without a final newline.

    Example:
        >>> print(table_text(Table(headings=["run", "mean batch"], cells=[["small", "4.5"]], notes=[])))
               mean
        run   batch
        ----- -----
        small   4.5
    """
    words = [heading.split() for heading in table.headings]
    height = max(len(heading) for heading in words)
    stacked = [[""] * (height - len(heading)) + heading for heading in words]
    head = [[heading[line] for heading in stacked] for line in range(height)]
    lines = [*head, *table.cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(words))]
    aligned = [
        " ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    rule = " ".join("-" * width for width in widths)
    return "\n".join([*aligned[:height], rule, *aligned[height:], *table.notes])


def _last_planned(run: Run, sizes: list[int]) -> int | None:
    """The last step's size, or the one before where the budget cut the last step short."""
    if not sizes:
        return None
    cut = run.steps[-1].reason == CUT and len(sizes) > 1
    return sizes[-2] if cut else sizes[-1]


def _cells(row: Row) -> list[str]:
    return [
        row.name,
        f"{row.steps:,}",
        "-" if row.mean_batch_size is None else f"{row.mean_batch_size:,.1f}",
        "-" if row.last_batch_size is None else f"{row.last_batch_size:,}",
        f"{row.samples:,}",
        f"{row.seconds:,.2f}",
        f"{row.measure_seconds:,.2f}",
        "-" if row.best_accuracy is None else f"{row.best_accuracy:.4f}",
        "-" if row.last_accuracy is None else f"{row.last_accuracy:.4f}",
    ]


def _notes(run: Run, metric: str | None) -> list[str]:
    notes = []
    own = accuracy_metric([run])
    if metric is not None and own is not None and not run.series(metric):
        notes.append(f"{run.name}: logged {metric_title(own)}, which is not compared with {metric_title(metric)}")
    if run.end is None:
        seen = run.steps[-1].samples_seen if run.steps else 0
        counts_samples = run.total_samples and seen <= run.total_samples and not run.counts_progress
        budget = f" of {run.total_samples:,}" if counts_samples else ""
        notes.append(f"{run.name}: stopped before its end, at {seen:,}{budget} samples")
    if run.skipped:
        notes.append(f"{run.name}: {run.skipped:,} update{'s' * (run.skipped > 1)} skipped (non-finite gradient)")
    return notes
