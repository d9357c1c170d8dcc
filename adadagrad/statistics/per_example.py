r"""`PerExample`: every example's gradient norm, exactly, inside the one backward that training does anyway."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from adadagrad.statistics.base import AbstractEstimator, Request
from adadagrad.statistics.example_instrument import ExampleInstrument


@dataclass(frozen=True, slots=True)
class PerExample(AbstractEstimator):
    r"""Measure every example's gradient exactly, in the ordinary backward, without a (b, d) tensor.

    .. math:: V = \frac{1}{b-1} \Bigl(\sum_i \|g_i\|^2 - b \|g\|^2\Bigr)

    In code: a tap behind every layer with a rule delivers the squared norms; inner products <g_i, g> follow
    from the layer applied to its input with g as its parameters, once g is known. Tables that all examples share
    (positions, a class token) are counted where they are added. Parameters that nothing of this can
    count are counted by rerunning the model example by example: exact, slower, said once in a warning. That
    the counted gradients add up to the trained one is verified at the measured steps 1, 2, 3, 5, 9, 17 and so on,
    and at every one where inner products are measured.

    When to use it: whenever examples do not influence each other. What breaks it: batch normalisation in
    training mode (`BatchCoupledModule`), dropout together with a parameter that has to be counted by a
    rerun (`UncoveredParameter`), and, without notice, what no backward shows: a loss that couples examples
    (contrastive), or one of several rows per example that is not said by `num_examples`. Cost: next to
    nothing for layers with one position; with several, one more weight gradient of the measured examples, or, where
    `fuse` applies, only that the ordinary one is formed in pieces; inner products one more forward of the measured
    examples, whose layer inputs and output gradients are kept until the step ends; coordinate sums the squares of
    the pieces, a product of squares for Linear with one position, elsewhere one more weight gradient.
    `GradientMeter.explain` says which layer is counted how.

    Args:
        calibrate: Run the model three times on a few examples at the first measurement (and at the second,
            third, fifth, ninth, ...), to find the batch dimension of every layer and to see that examples do
            not mix; twice more where something is shared by all examples. False trusts that the first dimension
            is the batch everywhere.
        fuse: Form the weight gradients of linear layers with several positions, of convolutions, GroupNorm and
            LayerNorm example by example, so that the norms cost no second product. `.grad` is then the ordinary one up
            to the order of summation: within 1e-12 (float64) or 1e-6 (float32) of its norm. False keeps every bit, for
            more time. The steps that verify are never fused.

    Source: closed forms of Bollapragada, Byrd, Nocedal (2017), arXiv 1710.11258 (number from memory, unverified
    (high)); the approximate tests of Lau, Liu, Kolar, arXiv 2402.11215. Differs from the paper: one backward instead of
    an extra vmapped one.

    Example:
        >>> import torch
        >>> from adadagrad.statistics.base import Request
        >>> model = nn.Linear(3, 1)
        >>> instrument = PerExample().open(model, Request())
        >>> with instrument.micro_batch():
        ...     model(torch.eye(3)).mean().backward()
        >>> round(instrument.finish().variance_trace, 6)  # rows e_i: g_i = e_i and 1 for the bias
        1.0
    """

    calibrate: bool = True
    fuse: bool = True

    def open(self, model: nn.Module, request: Request) -> ExampleInstrument:
        """Go to work on a model.

        Args:
            model: The module whose trainable parameters are measured.
            request: The numbers wanted.

        Returns:
            The instrument.
        """
        return ExampleInstrument(model, request, self.calibrate, self.fuse)
