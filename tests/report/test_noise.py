"""The noise scale of a run: by hand, against truths that are known, and where there is nothing to say."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest

from adadagrad.report.noise import NoiseScale, Stretch, noise_scale, stretches, true_grad_norm_sq, whole_noise_scale
from adadagrad.report.run import Run, StepRow
from adadagrad.report.tradeoff import steps_ratio


def row(s: float, v: float, size: int = 4, number: int = 1, **changes: Any) -> StepRow:
    known = {"step": number, "samples_seen": number * size, "global_batch_size": size, "seconds": 0.0}
    return StepRow(**known | {"grad_norm_sq": s, "variance_trace": v} | changes)


def run_of(rows: Sequence[StepRow], **start: Any) -> Run:
    return Run(name="run", start=start, steps=list(rows))


def test_ratio_of_means_and_its_error_by_hand() -> None:
    noise = noise_scale([row(6, 8), row(2, 4)])  # G = 4 and 1, V = 8 and 4: x = 2.5 / 6
    assert noise.inverse == pytest.approx(5 / 12)
    assert noise.value == pytest.approx(12 / 5)
    assert noise.error == pytest.approx(1 / 9)  # residuals 2/3 and -2/3: sqrt(8/9 / 2) / 6
    assert noise.freedom == 1


def test_batches_drawn_without_replacement() -> None:
    assert true_grad_norm_sq(row(6, 8)) == 4
    assert true_grad_norm_sq(row(6, 8), dataset_size=8) == 5
    assert true_grad_norm_sq(row(6, 8), dataset_size=4) == 6  # all of them: no noise
    assert true_grad_norm_sq(row(6, 8), dataset_size=2) == 6
    assert stretches(run_of([row(6, 8)] * 10, dataset_size=8))[0].noise.inverse == 5 / 8


def test_interval_by_hand() -> None:
    low, high = NoiseScale(inverse=0.01, error=0.001, freedom=2).interval()  # t = 4.3027
    assert (low, high) == pytest.approx((1 / 0.0143027, 1 / 0.0056973), rel=1e-4)
    unknown = NoiseScale(inverse=0.01, error=0.003, freedom=2)
    assert unknown.interval() == pytest.approx((1 / 0.0229080, math.inf), rel=1e-4)
    assert not unknown.is_known
    below = NoiseScale(inverse=-0.02, error=0.003, freedom=2)
    assert below.value == math.inf
    assert below.interval() == (math.inf, math.inf)


def test_no_variance_is_no_noise() -> None:
    noise = noise_scale([row(6, 0), row(2, 0)])
    assert (noise.value, noise.interval()) == (0.0, (0.0, 0.0))
    assert whole_noise_scale([Stretch(rows=(row(6, 0),), noise=noise)], 64).value == 0.0


@pytest.mark.parametrize(("steps", "lengths"), [(9, []), (10, [10]), (25, [12, 13]), (200, [25] * 8)])
def test_stretches_hold_about_equally_many_measured_steps(steps: int, lengths: list[int]) -> None:
    rows = [row(6, 8, number=number) for number in range(1, steps + 1)]
    parts = stretches(run_of([rows[0], row(1, 1, variance_trace=None), row(1, 1, grad_norm_sq=math.nan), *rows[1:]]))
    assert [len(part.rows) for part in parts] == lengths
    assert [r for part in parts for r in part.rows] == (rows if lengths else [])
    assert not parts or (parts[0].samples[0], parts[-1].samples[1]) == (0, 4 * steps)


def test_loss_is_a_mean_of_what_is_there() -> None:
    rows = (row(6, 8, loss=1.0), row(6, 8, loss=None), row(6, 8, loss=2.0))
    noise = NoiseScale(inverse=1.0, error=0.0, freedom=2)
    assert Stretch(rows=rows, noise=noise).loss == 1.5
    assert Stretch(rows=rows[1:2], noise=noise).loss is None


def part(inverse: float, steps: int, error: float = 0.0) -> Stretch:
    noise = NoiseScale(inverse=inverse, error=error, freedom=steps - 1)
    return Stretch(rows=(row(1, 1, size=64),) * steps, noise=noise)


def test_the_whole_run_by_hand() -> None:
    # shares of signal 1/2 and 0, three steps to one: u = 3/8, B = 64 (1 - u) / u
    whole = whole_noise_scale([part(1 / 64, 3), part(0.0, 1)], 64)
    assert whole.value == pytest.approx(64 * 5 / 3)
    assert whole.freedom == 2
    alone = part(0.002, 30, error=0.0005)
    same = whole_noise_scale([alone], 64)
    assert (same.inverse, same.error) == pytest.approx((0.002, 0.0005))
    halved = whole_noise_scale([alone, alone], 64)
    assert (halved.inverse, halved.error) == pytest.approx((0.002, 0.0005 / math.sqrt(2)))


@pytest.mark.parametrize("factor", [2, 8])
def test_the_whole_run_takes_as_many_steps_as_its_parts(factor: int) -> None:
    parts = [part(1 / 20, 5), part(1 / 300, 10), part(-0.001, 5)]
    apart = sum(len(p.rows) * (share + (1 - share) / factor) for p, share in ((p, _share(p)) for p in parts)) / 20
    assert steps_ratio(whole_noise_scale(parts, 64).value, 64, factor) == pytest.approx(apart)


def _share(one: Stretch) -> float:
    return one.noise.inverse * 64 / (1 + one.noise.inverse * 64)


def measured(units: Sequence[Sequence[float]]) -> StepRow:
    """A step's row from its examples' gradients, by the definitions."""
    b, mean = len(units), [sum(column) / len(units) for column in zip(*units, strict=True)]
    s = sum(x * x for x in mean)
    v = (sum(x * x for unit in units for x in unit) - b * s) / (b - 1)
    return row(s, v, size=b)


@pytest.mark.parametrize(("length", "steps"), [(1.0, 40), (0.4, 40), (0.4, 12)])
def test_intervals_hold_a_known_noise_scale(length: float, steps: int) -> None:
    """Gradients N(G, I) in five dimensions: B = 5 / |G|^2; at the smaller |G| the upper end is often infinite."""
    noise, truth, trials = random.Random(7), 5 / length**2, 300
    mean = [length, 0.0, 0.0, 0.0, 0.0]
    inside = above = below = 0
    for _ in range(trials):
        rows = [measured([[noise.gauss(m, 1) for m in mean] for _ in range(6)]) for _ in range(steps)]
        low, high = noise_scale(rows).interval()
        inside += low <= truth <= high
        above += low > truth
        below += high < truth
    assert inside / trials == pytest.approx(0.95, abs=0.04)
    assert max(above, below) / trials < 0.06


def test_pure_noise_is_not_called_known() -> None:
    noise, trials = random.Random(3), 300
    known = 0
    for _ in range(trials):
        rows = [measured([[noise.gauss(0, 1) for _ in range(5)] for _ in range(6)]) for _ in range(20)]
        known += noise_scale(rows).is_known
    assert known / trials < 0.05


def test_epochs_of_a_small_data_set_give_its_own_noise_scale() -> None:
    """48 fixed gradients in batches of 8 without replacement: the truth is their own mean's, not a population's."""
    noise, inside, trials = random.Random(5), 0, 100
    total = uncorrected = 0.0
    data = [[noise.gauss(m, 1) for m in (0.3, 0.0, 0.0)] for _ in range(48)]
    whole = measured(data)
    assert whole.grad_norm_sq is not None
    assert whole.variance_trace is not None
    truth = whole.variance_trace / whole.grad_norm_sq
    for _ in range(trials):
        rows = []
        for _ in range(5):
            order = noise.sample(data, len(data))
            rows += [measured(order[first : first + 8]) for first in range(0, 48, 8)]
        scale = noise_scale(rows, dataset_size=48)
        low, high = scale.interval()
        inside += low <= truth <= high
        total += scale.inverse * truth / trials
        uncorrected += noise_scale(rows).inverse * truth / trials
    assert total == pytest.approx(1.0, abs=0.05)
    assert uncorrected < 0.8
    assert inside / trials > 0.93
