"""What the measured noise says about the batch size, in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from adadagrad.report.noise import NoiseScale, Stretch
from adadagrad.report.wording import between, examples, two_digits

RANGE = 4
"""From this many times the noise scale on, no larger batch saves more than a fifth of the steps: (1 + 1/4) / 1 = 5/4;
below its fourth part no smaller one saves more than a fifth of the samples."""

GROWTH = 2
"""By how much the noise scale must have grown, errors allowed for, to be called growing."""


def advice(whole: NoiseScale, parts: Sequence[Stretch], batch_size: int, dataset_size: int | None) -> list[str]:
    """Say which batch size to use, and what speaks against relying on it.

    Args:
        whole: The noise scale that stands for the whole run.
        parts: The run's stretches, at least one.
        batch_size: The batch at which it was measured [examples].
        dataset_size: N, None where the log does not say.

    Returns:
        Sentences, the advice first.
    """
    return [_size(whole, batch_size, dataset_size), *_growth(parts), *_loss(parts)]


def _size(whole: NoiseScale, batch_size: int, dataset_size: int | None) -> str:
    low, _ = whole.interval()
    if not whole.is_known and low <= batch_size:
        return (
            f"These steps do not say which batch size: they differ so much that the noise scale may be {examples(low)} "
            "examples or any number above. Measure again with more --samples."
        )
    if not whole.is_known:
        known = f": the noise scale is at least {examples(low)}" if math.isfinite(low) else ""
        more = (
            ""
            if dataset_size is not None and 4 * batch_size > dataset_size
            else (
                f"; measure again with --global-batch-size {4 * batch_size}, or more --samples, to see where that ends"
            )
        )
        return (
            f"More than {batch_size:,} examples per step: at {batch_size:,} the gradient cannot be told from its "
            f"noise{known}, so a larger batch saves steps and costs hardly any samples{more}."
        )
    size, said = two_digits(whole.value), between(whole.value, *whole.interval())
    if size < 1:
        return f"One example per step: the noise scale, about {said}, is below that, so larger batches waste samples."
    if dataset_size is not None and size >= dataset_size:
        return (
            f"As many examples per step as memory allows: the noise scale, about {said}, is not below the "
            f"{dataset_size:,} examples of the data set, so a larger batch saves steps and costs hardly any samples."
        )
    return (
        f"About {said} examples per step: there, steps and samples are each about twice the least possible. "
        f"Batches above {examples(RANGE * size)} mostly waste samples (no larger batch saves more than a fifth of "
        f"the steps), those below {examples(max(1.0, size / RANGE))} mostly waste steps."
    )


def _growth(parts: Sequence[Stretch]) -> list[str]:
    first, last = parts[0].noise, parts[-1].noise
    if not last.interval()[0] > GROWTH * first.interval()[1]:
        return []
    end = f"about {examples(last.value)}" if last.is_known else "more than can be told from this batch"
    return [
        f"The noise scale grew from about {examples(first.value)} to {end} during the run, so a batch that grows "
        "(adadagrad train: the recommended policy does) fits better than any constant one, and a longer run wants a "
        "larger batch."
    ]


def _loss(parts: Sequence[Stretch]) -> list[str]:
    first, last = parts[0].loss, parts[-1].loss
    if len(parts) < 2 or first is None or last is None or last < first:
        return []
    return [
        f"The loss did not fall ({first:.4f} to {last:.4f}): these numbers are those of a training that does not "
        "work; choose another --lr first."
    ]
