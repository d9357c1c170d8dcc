r"""What a larger batch buys: fewer steps for more samples, along two hyperbolas. Pure arithmetic."""

from __future__ import annotations

import math


def steps_over_least(noise_scale: float, batch_size: float) -> float:
    r"""Return how many steps a batch size takes, in units of the fewest that any batch could take.

    .. math:: \frac{S}{S_{\min}} = 1 + \frac{B}{b}, \qquad \frac{E}{E_{\min}} = 1 + \frac{b}{B}

    In code: B is `noise_scale`, b `batch_size`, S steps and E samples to the same loss; `samples_over_least` is the
    second. So (S/S_min - 1)(E/E_min - 1) = 1, and at b = B both are twice their minimum: the point of diminishing
    returns.

    A rule of thumb. It is derived for one step of SGD with the best learning rate at each batch size, which is
    lr_max / (1 + B/b), on a quadratic whose Hessian is a multiple of the identity, with data that do not run out. What
    breaks it: a learning rate that stays as it is, strong curvature in few directions, adaptive optimizers. In
    language models the noise scale has been found to lie far below the largest useful batch (arXiv 2505.23971,
    verified in the full text).

    Args:
        noise_scale: B = V / |grad F|^2 [examples], >= 0; infinite where there is nothing but noise.
        batch_size: b > 0 [examples].

    Returns:
        At least 1, dimensionless; infinite for an infinite noise scale.

    Source: McCandlish, Kaplan, Amodei et al. (2018), "An Empirical Model of Large-Batch Training", arXiv 1812.06162
        (from memory, unverified (high)).
    Differs from the paper: there B is tr(H Sigma) / (grad F^T H grad F), which needs the Hessian H; here, as in the
        paper's own approximation, H is left out.

    Example:
        >>> steps_over_least(noise_scale=200, batch_size=200), steps_over_least(noise_scale=200, batch_size=800)
        (2.0, 1.25)
    """
    return 1 + noise_scale / batch_size


def samples_over_least(noise_scale: float, batch_size: float) -> float:
    """Return how many samples a batch size takes, in units of the fewest that any batch could take.

    Args:
        noise_scale: As for `steps_over_least`, which has the equation.
        batch_size: b > 0 [examples].

    Returns:
        At least 1, dimensionless; infinite for a noise scale of 0.

    Example:
        >>> samples_over_least(noise_scale=200, batch_size=200), samples_over_least(noise_scale=200, batch_size=800)
        (2.0, 5.0)
    """
    return 1 + batch_size / noise_scale if noise_scale > 0 else math.inf


def steps_ratio(noise_scale: float, batch_size: float, factor: float) -> float:
    r"""Return by what factor the steps change when the batch is multiplied.

    .. math:: \frac{S(kb)}{S(b)} = \frac{1 + B/(kb)}{1 + B/b} = u + \frac{1 - u}{k}, \qquad u = \frac{1}{1 + B/b}

    In code: k is `factor`; u is the share of the true gradient in the expected squared length of the batch's.

    Args:
        noise_scale: B >= 0 [examples], may be infinite.
        batch_size: b > 0 [examples].
        factor: k > 0.

    Returns:
        Between 1 / k, where noise is all there is, and 1, where there is none.

    Example:
        >>> steps_ratio(200, 200, 2), steps_ratio(float("inf"), 200, 2), steps_ratio(0, 200, 2)
        (0.75, 0.5, 1.0)
    """
    share = 1 / steps_over_least(noise_scale, batch_size)
    return share + (1 - share) / factor


def samples_ratio(noise_scale: float, batch_size: float, factor: float) -> float:
    """Return by what factor the samples change when the batch is multiplied: k times that of the steps.

    Args:
        noise_scale: As for `steps_ratio`.
        batch_size: b > 0 [examples].
        factor: k > 0.

    Returns:
        Between 1, where noise is all there is, and k: (1 + kb/B) / (1 + b/B).

    Example:
        >>> samples_ratio(200, 200, 2), samples_ratio(float("inf"), 200, 2), samples_ratio(0, 200, 2)
        (1.5, 1.0, 2.0)
    """
    return factor * steps_ratio(noise_scale, batch_size, factor)
