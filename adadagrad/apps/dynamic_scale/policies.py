"""Which kind of batch comes next: pure functions from the share of loss on small objects to yes or no.

A policy has no state. What is remembered of earlier steps lives in the feedback (its `ema`), so a smoothed threshold is
a `ThresholdPolicy` on a smoothed share: the number that decides is the number that is logged, and it is saved in one
place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from adadagrad.core.checks import check_at_least, check_fraction, check_integer
from adadagrad.core.mixing import seed_for

_DRAW = 0x5717C4
"""Sets a policy's draws apart from other uses of the same seed, such as the order of the data."""


class AbstractScalePolicy(ABC):
    """Decides whether the next batch is stitched of shrunk images."""

    @abstractmethod
    def decide(self, share: float | None, step: int) -> bool:
        """Return whether the next batch is to be stitched.

        Args:
            share: r, the share of loss on small objects in the step before; None where there is none.
            step: Steps taken so far, >= 0.

        Returns:
            True for a stitched batch, False for a regular one.
        """


@dataclass(frozen=True, slots=True)
class ThresholdPolicy(AbstractScalePolicy):
    r"""Stitch the next batch where small objects had less than a share tau of the loss: dynamic scale training.

    .. math:: \text{stitch at } t \iff r_{t-1} < \tau, \qquad r_0 = 0

    In code: r is `share`. The comparison is strict, so tau = 0 never stitches, and tau > 1 always does where there is
    a share. No share (None) means a regular batch; which share stands for a step without any loss is the feedback's
    `on_empty`.

    Without memory (the feedback's ``ema=0``) the rule tends to alternate: a stitched step has a share near 1, the next
    regular one a share near 0. The stitched fraction is then about 1/2 whatever tau is; on synthetic scenes, with tau =
    0.3, every other batch was stitched but for one place in 500 steps. So look at the fraction that was realised, and
    compare with `RandomPolicy` at the same one: what is gained over it may be the even spacing and not the feedback.

    Args:
        tau: Share below which to stitch, >= 0, no unit. Smaller stitches less often. 0.1 was best on COCO
            (second-hand).

    Raises:
        InvalidArgument: tau is negative, NaN or infinite.

    Source: Chen et al. (2020), "Dynamic Scale Training for Object Detection", arXiv 2004.12432 (first called
        "Stitcher"); the rule is verified in the authors' public code, its letters are second-hand. Differs from the
        paper: no; in the code NaN decides about steps without objects, here `on_empty` does.

    Example:
        >>> [ThresholdPolicy(0.1).decide(share, step=7) for share in (0.0, 0.05, 0.1, 0.4, None)]
        [True, True, False, False, False]
    """

    tau: float = 0.1

    def __post_init__(self) -> None:
        check_at_least(0, tau=self.tau)

    def decide(self, share: float | None, step: int) -> bool:
        """Return whether the share is below tau.

        Args:
            share: r; None where there is none.
            step: Not used.

        Returns:
            True for a stitched batch.
        """
        return share is not None and share < self.tau


@dataclass(frozen=True, slots=True)
class RandomPolicy(AbstractScalePolicy):
    """Stitch with a fixed probability, whatever the loss says: the baseline that feedback has to beat.

    The draw is a hash of (seed, step): it needs no state, is the same on all ranks, and goes on after a resume.

    Args:
        p: Probability of a stitched batch, from 0 (never) to 1 (always).
        seed: Any integer; another one gives another sequence.

    Raises:
        InvalidArgument: p is no probability, or seed no integer.

    Source: the comparison is named in arXiv 2004.12432 (second-hand); the hash is this library's.

    Example:
        >>> [RandomPolicy(0.5, seed=1).decide(None, step) for step in range(8)].count(True)
        3
    """

    p: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_fraction(p=self.p)
        check_integer(-(2**63), seed=self.seed)

    def decide(self, share: float | None, step: int) -> bool:
        """Return the draw of a step.

        Args:
            share: Not used.
            step: Steps taken so far, >= 0.

        Returns:
            True for a stitched batch.
        """
        return (seed_for(self.seed, _DRAW, step) >> 11) / 2**53 < self.p


@dataclass(frozen=True, slots=True)
class AlwaysStitch(AbstractScalePolicy):
    """Stitch every batch: objects of full size are then never seen, and are not learnt (see the benchmark).

    Example:
        >>> AlwaysStitch().decide(0.9, step=0)
        True
    """

    def decide(self, share: float | None, step: int) -> bool:
        """Return True.

        Args:
            share: Not used.
            step: Not used.
        """
        return True


@dataclass(frozen=True, slots=True)
class NeverStitch(AbstractScalePolicy):
    """Stitch no batch: plain training, and the stream of a plain loader.

    Example:
        >>> NeverStitch().decide(0.0, step=0)
        False
    """

    def decide(self, share: float | None, step: int) -> bool:
        """Return False.

        Args:
            share: Not used.
            step: Not used.
        """
        return False
