"""What the tests would ask for: by hand, as the policies do, and where a batch passes at last."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest

from adadagrad.core.records import GradientStatistics, Observation
from adadagrad.policies import AugmentedInnerProductTest, InnerProductTest, NormTest
from adadagrad.report.noise import NoiseScale
from adadagrad.report.run import StepRow
from adadagrad.report.wishes import Wish, inner_product_wish, mean_wish, norm_wish, orthogonality_wish
from tests.report.test_noise import row

ROWS = [row(s, v, inner_product_variance=vp) for s, v, vp in ((4, 9, 4), (5, 8, 9), (3.5, 10, 6), (6, 7, 12))]


@pytest.mark.parametrize(("eta", "size"), [(0.5, 300), (0.25, 1500), (2**-0.5, 100), (1.5, 0)])
def test_the_norm_tests_fixed_point_by_hand(eta: float, size: float) -> None:
    exact = norm_wish(NoiseScale(inverse=0.01, error=0.0, freedom=9), eta)
    assert (exact.value, exact.low, exact.high) == pytest.approx((size, size, size))


@pytest.mark.parametrize("eta", [0.25, 0.5, 0.9])
def test_at_its_fixed_point_the_norm_test_asks_for_the_batch_it_has(eta: float) -> None:
    true_grad_norm_sq, v = 0.3, 12.0
    size = norm_wish(NoiseScale(inverse=true_grad_norm_sq / v, error=0.0, freedom=9), eta).value
    for factor, passes in ((1.0, True), (1.01, True), (0.99, False)):
        b = factor * size
        statistics = GradientStatistics(num_examples=64, grad_norm_sq=true_grad_norm_sq + v / b, variance_trace=v)
        asked = NormTest(eta=eta).required_batch_size(Observation(gradient=statistics))
        assert (asked <= b * (1 + 1e-9)) == passes


def test_an_unknown_noise_scale_gives_a_lower_end_alone() -> None:
    wish = norm_wish(NoiseScale(inverse=0.001, error=0.002, freedom=1000), 0.5)
    assert 0 < wish.low < wish.value < wish.high == math.inf


def _sizes(rows: Sequence[StepRow], theta: float, nu: float) -> tuple[float, float]:
    """The two policies' answers to the mean statistics."""
    s, v, vp = (
        sum(getattr(r, name) for r in rows) / len(rows)
        for name in ("grad_norm_sq", "variance_trace", "inner_product_variance")
    )
    gradient = GradientStatistics(num_examples=4, grad_norm_sq=s, variance_trace=v, inner_product_variance=vp)
    seen = Observation(gradient=gradient)
    along = InnerProductTest(theta=theta).required_batch_size(seen)
    return along, AugmentedInnerProductTest(theta=theta, nu=nu).required_batch_size(seen)


@pytest.mark.parametrize(("theta", "nu"), [(0.9, 5.84), (2.0, 0.5)])
def test_they_ask_for_what_the_policies_ask_of_the_averages(theta: float, nu: float) -> None:
    along, across = inner_product_wish(ROWS, theta), orthogonality_wish(ROWS, nu)
    assert along is not None
    assert across is not None
    assert (along.value, along.larger(across).value) == pytest.approx(_sizes(ROWS, theta, nu))


@pytest.mark.parametrize("ask", [inner_product_wish, orthogonality_wish])
def test_the_error_is_that_of_the_jackknife(ask: Callable[[Sequence[StepRow], float], Wish | None]) -> None:
    rows = [*ROWS, *(row(4.5 + 0.1 * n, 8, inner_product_variance=7 + (-1) ** n) for n in range(20))]
    whole = ask(rows, 0.1)
    without = [ask([*rows[:n], *rows[n + 1 :]], 0.1) for n in range(len(rows))]
    assert whole is not None
    values = [wish.value for wish in without if wish is not None]
    mean = sum(values) / len(rows)
    error = math.sqrt((len(rows) - 1) / len(rows) * sum((value - mean) ** 2 for value in values))
    assert whole.high - whole.value == pytest.approx(2.069 * error, rel=0.03)  # Student's t, 23 degrees of freedom
    assert whole.value - whole.low == pytest.approx(2.069 * error, rel=0.03)


@pytest.mark.parametrize("rows", [[row(4, 9)] * 3, [*ROWS, row(4, 9)], [row(0, 9, inner_product_variance=0)] * 3])
def test_where_inner_products_are_missing_or_there_is_no_gradient(rows: list[StepRow]) -> None:
    assert inner_product_wish(rows, 0.9) is None
    assert orthogonality_wish(rows, 5.84) is None


def test_the_mean_of_stretches_by_hand() -> None:
    mean = mean_wish([Wish(value=10, low=6, high=14), Wish(value=20, low=17, high=29)], [1, 1])
    assert (mean.value, mean.low, mean.high) == pytest.approx((15, 15 - 2.5, 15 + math.hypot(2, 4.5)))
    assert mean_wish([Wish(value=1, low=0, high=2), Wish(value=5, low=5, high=5)], [3, 1]).value == 2
