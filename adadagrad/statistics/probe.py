r"""`Probe`: every example's gradient norm from a few random sketches, where exact norms would cost a product."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from adadagrad.core.checks import check_integer
from adadagrad.statistics.base import AbstractEstimator, Request
from adadagrad.statistics.example_instrument import ExampleInstrument
from adadagrad.statistics.sketching import Sketching


@dataclass(frozen=True, slots=True)
class Probe(AbstractEstimator):
    r"""Estimate every example's gradient norm from k random sketches, without bias, in the ordinary backward.

    .. math:: \|g_i\|^2 = E_w \|g_i w\|^2, \qquad w_j = \pm 1

    In code: as `PerExample`, with two thin products (for a convolution, a convolution with k output filters) in the
    place of a whole one for Linear with several positions and Conv1d/2d/3d, wherever that is fewer flops. One position,
    norms, biases, embeddings, first convolutions, attention and recurrent layers stay exact; so does a parameter of
    several calls or layers (the sketches of its calls are not added here); so do inner products and the coordinate
    ratio, which are formed as `PerExample` forms them, for its price. |g|^2 in V is sketched with the same signs as the
    |g_i|^2, so that their errors cancel; `grad_norm_sq` itself is exact.

    `variance_trace_error` is sqrt(a^2 + e^2): a the error from the spread of the |g_i|^2 over examples, as for
    `PerExample`, and e that of the probes (below). How the sketches' errors differ between examples is in a as well,
    and shrinks with 1 / n: with a handful of examples the error is said to be larger than it is.

    .. math:: e^2 = \frac{1}{(1 - \sum_i w_i^2)^2} \sum_l \frac{1}{k(k-1)} \sum_r (Z_{lr} - \bar Z_l)^2

    with Z_lr what probe r says of layer l (`sketches.py`). With one probe it is None.

    When to use it: where memory traffic is what exact norms cost, on an accelerator with wide layers and a few
    examples. What breaks it: nothing more than `PerExample`. All examples share the signs, so the error of the probes
    does not shrink with the batch, only with k and over steps: relative to V at most sqrt(2/(k rho)) for a layer whose
    per-example gradients have effective rank rho. On a CPU a part of the batch measured exactly is the better bargain.
    Cost: 2 T k (d + p) flop an example and layer, beside 2 T d p; nothing is fused, and the gradients keep every bit.

    Args:
        probes: k, sketches of each layer, >= 1. More cost more, and their error shrinks with sqrt(k).
        seed: Seeds the signs, which are a function of the seed, the number of the measured step, the layer's name and
            the probe. The random numbers of the model are not touched.
        calibrate: As for `PerExample`.

    Raises:
        InvalidArgument: `probes` is no integer >= 1, or `seed` no integer.

    Source: Hutchinson (1990), A stochastic estimator of the trace (from memory, unverified (high)). Differs from the
    paper: the trace is that of g_i^T g_i, and all examples of a layer share one draw.

    Example:
        >>> import torch
        >>> from adadagrad.statistics.base import Request
        >>> model = nn.Linear(3, 1)
        >>> instrument = Probe().open(model, Request())
        >>> with instrument.micro_batch():
        ...     model(torch.eye(3)).mean().backward()
        >>> round(instrument.finish().variance_trace, 6)  # one position: exact, as PerExample
        1.0
    """

    probes: int = 4
    seed: int = 0
    calibrate: bool = True

    def __post_init__(self) -> None:
        check_integer(1, probes=self.probes)
        check_integer(-(2**63), seed=self.seed)

    def open(self, model: nn.Module, request: Request) -> ExampleInstrument:
        """Go to work on a model.

        Args:
            model: The module whose trainable parameters are measured.
            request: The numbers wanted.

        Returns:
            The instrument.
        """
        return ExampleInstrument(model, request, self.calibrate, False, Sketching(self.probes, self.seed))
