"""What `adadagrad measure` answers: the noise scale over a run, and the batch sizes that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adadagrad.report.advice import advice
from adadagrad.report.noise import LEAST_STEPS, NoiseScale, Stretch, measured_rows, stretches, whole_noise_scale
from adadagrad.report.run import Run
from adadagrad.report.table import Table
from adadagrad.report.tradeoff import samples_ratio, steps_ratio
from adadagrad.report.wishes import Wish, inner_product_wish, mean_wish, norm_wish, orthogonality_wish
from adadagrad.report.wording import between, times

WATCHING = "Watch()"
"""The policy, as the log names it, of a run that was made to be measured."""

ETAS = (0.25, 0.5)
THETA, NU = 0.9, 5.84
FACTORS = (2, 4, 8)

LIMITS = (
    "Intervals hold the truth in about 95 of 100 cases. Steps and samples are a rule of thumb (McCandlish et al. "
    "2018): they assume the best learning rate at each batch size, which grows with it, and data that do not run out. "
    "Adaptive optimizers and language models often bear larger batches."
)
"""What the reader should know of all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """The answers of one run, as tables and sentences.

    Args:
        measured: What was measured, in a line.
        advice: Which batch size to use, in words.
        course: The noise scale over the run; None where the weights stood still.
        sizes: The batch sizes that follow from it.
        changes: What a larger batch would change.
        limits: What to keep in mind.
    """

    measured: str
    advice: list[str]
    course: Table | None
    sizes: Table
    changes: Table
    limits: str = LIMITS

    @property
    def tables(self) -> list[Table]:
        """All tables in the order of reading."""
        return [table for table in (self.course, self.sizes, self.changes) if table is not None]


def answers(run: Run) -> Answers | None:
    """Answer for a run that was made to be measured.

    Args:
        run: Of a constant batch size.

    Returns:
        The answers; None for any other run, and where fewer than `LEAST_STEPS` steps were measured.
    """
    fixed = all(step.lr == 0 for step in run.steps)
    if run.start.get("policy") != WATCHING or len(measured_rows(run)) < LEAST_STEPS:
        return None
    parts = stretches(run, most=1) if fixed else stretches(run)
    batch_size = parts[0].rows[0].global_batch_size
    size = run.start.get("dataset_size")
    dataset_size = size if isinstance(size, int) else None
    whole = whole_noise_scale(parts, batch_size)
    return Answers(
        measured=_measured(run, parts, batch_size, fixed),
        advice=advice(whole, parts, batch_size, dataset_size),
        course=None if fixed else _course(parts),
        sizes=_sizes(parts, whole, batch_size, dataset_size, fixed),
        changes=_changes(whole, batch_size),
    )


def _measured(run: Run, parts: Sequence[Stretch], batch_size: int, fixed: bool) -> str:
    count, steps = sum(len(part.rows) for part in parts), len(run.steps)
    which = "all measured" if count == steps else f"{count:,} of them measured"
    how = "at weights that stood still" if fixed else f"of training with {run.start.get('optimizer', 'its optimizer')}"
    return f"{steps:,} steps of {batch_size:,} examples {how}, {which}"


def _course(parts: Sequence[Stretch]) -> Table:
    cells = []
    for part in parts:
        first, last = part.samples
        loss = "-" if part.loss is None else f"{part.loss:.4f}"
        cells.append([f"{first:,} to {last:,}", loss, between(part.noise.value, *part.noise.interval())])
    return Table(headings=["samples", "loss", "noise scale"], cells=cells, notes=[])


def _sizes(
    parts: Sequence[Stretch], whole: NoiseScale, batch_size: int, dataset_size: int | None, fixed: bool
) -> Table:
    last = parts[-1]
    scales = [whole] if len(parts) == 1 else [whole, last.noise]
    cells = [["diminishing returns", *(between(n.value, *n.interval()) for n in scales)]]
    wishes = []
    for eta in ETAS:
        wishes.append([norm_wish(noise, eta) for noise in scales])
        cells.append([f"norm test, eta {eta}", *map(_text, wishes[-1])])
    notes = []
    for name, ask in (
        (f"inner product test, {THETA} *", _along),
        (f"augmented test, {THETA} and {NU} *", _both),
    ):
        asked = [ask(part) for part in parts]
        known = [wish for wish in asked if wish is not None]
        if len(known) == len(parts):
            mean = mean_wish(known, [len(part.rows) for part in parts])
            row = [mean] if len(parts) == 1 else [mean, known[-1]]
            wishes.append(row)
            cells.append([name, *map(_text, row)])
    if len(cells) > 1 + len(ETAS):
        notes.append(
            f"* as measured at {batch_size:,} examples; up to {batch_size:,} means that the test passes there. The "
            "others are the smallest batches that pass, measured at that very size."
        )
    if dataset_size is not None and any(wish.value > dataset_size for row in wishes for wish in row):
        notes.append(f"A size above {dataset_size:,}, all the examples there are, means that only all of them pass.")
    columns = ["these weights"] if fixed else ["whole run"] if len(parts) == 1 else ["whole run", "its end"]
    return Table(headings=["batch size", *columns], cells=cells, notes=notes)


def _along(part: Stretch) -> Wish | None:
    return inner_product_wish(part.rows, THETA)


def _both(part: Stretch) -> Wish | None:
    along, across = inner_product_wish(part.rows, THETA), orthogonality_wish(part.rows, NU)
    return None if along is None or across is None else along.larger(across)


def _changes(whole: NoiseScale, batch_size: int) -> Table:
    """Factors on steps and samples; both fall as the noise scale rises, so the ends of its interval swap places."""
    cells = []
    for factor in FACTORS:
        row = [f"{factor} x {batch_size:,} = {factor * batch_size:,}"]
        ratios: tuple[Callable[[float, float, float], float], ...] = (steps_ratio, samples_ratio)
        for ratio in ratios:
            low, high = (ratio(end, batch_size, factor) for end in reversed(whole.interval()))
            row.append(times(ratio(whole.value, batch_size, factor), low, high))
        cells.append(row)
    return Table(headings=["batch size", "steps", "samples"], cells=cells, notes=[])


def _text(wish: Wish) -> str:
    return between(wish.value, wish.low, wish.high)
