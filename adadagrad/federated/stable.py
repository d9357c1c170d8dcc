r"""Symmetric alpha-stable noise: heavy-tailed numbers whose sums keep their kind, drawn in torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adadagrad.core.checks import check_at_least
from adadagrad.core.errors import InvalidArgument


def sample_alpha_stable(
    shape: Sequence[int],
    alpha: float,
    scale: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Draw independent symmetric alpha-stable numbers by the method of Chambers, Mallows and Stuck.

    .. math:: X = c \, \frac{\sin(\alpha U)}{\cos(U)^{1/\alpha}}
        \left( \frac{\cos((1 - \alpha) U)}{W} \right)^{(1 - \alpha) / \alpha},
        \quad U \sim \text{Uniform}(-\pi/2, \pi/2), \; W \sim \text{Exp}(1)

    so that E exp(i tau X) = exp(-|c tau|^alpha); at alpha = 1 it is c tan U. In code: c is `scale`.

    The scale is not a standard deviation: at alpha = 2 X is normal with variance 2 c^2, and below 2 no variance
    exists. U and W are drawn in float64 and kept away from the ends, where the formula has no finite value.

    Args:
        shape: Of the result.
        alpha: Tail index, above 0 and at most 2: below it the moments exist. Smaller means heavier tails.
        scale: c, >= 0 [unit of the result].
        generator: Where the randomness comes from; it must be of `device`. None takes torch's own.
        device: Where to draw; None takes the generator's device, else the CPU.
        dtype: Of the result, None for torch's default. What exceeds a narrower one is cut to its largest number.

    Returns:
        The numbers, all finite.

    Raises:
        InvalidArgument: `alpha` or `scale` is out of its range, or the dtype holds no fractions.

    Source: Chambers, Mallows, Stuck (1976), "A method for simulating stable random variables" (the formula was
        checked against its characteristic function and a library's quantiles).
    Differs from the paper: no.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = sample_alpha_stable((100_000,), alpha=1.5, scale=0.1, generator=generator, dtype=torch.float64)
        >>> round(torch.cos(10 * x).mean().item(), 2), round(math.exp(-1), 2)  # the characteristic function at 10
        (0.37, 0.37)
    """
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= 2:
        raise InvalidArgument(f"alpha must be above 0 and at most 2, got {alpha!r}")
    check_at_least(0, scale=scale)
    kind = torch.get_default_dtype() if dtype is None else dtype
    if not kind.is_floating_point:
        raise InvalidArgument(f"dtype must be of floating-point numbers, got {kind}")
    place = torch.device(device) if device is not None else generator.device if generator else torch.device("cpu")
    uniform = torch.rand(tuple(shape), generator=generator, device=place, dtype=torch.float64)
    tiny = 2.0**-53  # half the distance of neighbours in [0, 1): the ends themselves are not drawn then
    angle = (uniform.clamp_(tiny, 1 - tiny) - 0.5) * math.pi
    other = torch.rand(tuple(shape), generator=generator, device=place, dtype=torch.float64)
    waiting = -torch.log1p(-other.clamp_(tiny, 1 - tiny))
    if alpha == 1:
        drawn = torch.tan(angle)
    else:
        drawn = torch.sin(alpha * angle) / torch.cos(angle) ** (1 / alpha)
        drawn = drawn * (torch.cos((1 - alpha) * angle) / waiting) ** ((1 - alpha) / alpha)
    largest = torch.finfo(kind).max
    return (scale * drawn).clamp_(-largest, largest).to(kind)
