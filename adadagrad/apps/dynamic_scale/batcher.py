"""The loader of dynamic scale training: before each batch it decides, in the training process, which kind it is."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from functools import partial
from typing import Any, final

import torch

from adadagrad.apps.dynamic_scale.feedback import LossShareFeedback
from adadagrad.apps.dynamic_scale.policies import AbstractScalePolicy, ThresholdPolicy
from adadagrad.apps.dynamic_scale.stitching import batch_stitch, stitch4
from adadagrad.apps.dynamic_scale.stream import Collate, ImageStream, MakeBatch, Stitch
from adadagrad.batching import SampleOrder
from adadagrad.core.checks import check_integer
from adadagrad.core.comm import Ranks, all_ranks
from adadagrad.core.errors import EmptyDataset, InvalidArgument, UnsizedDataset
from adadagrad.core.mixing import seed_for

_STITCHED = 0x571C
"""Sets the order of the stitched stream apart from that of the regular one."""
_COUNTS = ("step", "stitched_steps", "images_read")


@final
class ScaleBatcher:
    """Give batches without end, each regular or stitched as the policy says when it is asked for.

    Two streams go over the same data set: regular batches of n images, and stitched ones for which k n images are read.
    A stream stands still while the other one is used, so with a policy that never stitches the batches are bit for bit
    those of a plain loader. The decision falls in this process when the batch is asked for, on the loss of the step
    before it; workers only fetch data ahead, at most two batches each of either kind. Call ``feedback.update`` after
    every step, before the next batch is asked for; a step without an update keeps the share.

    Learning rate and number of steps are left alone. A stitched step costs the time of a regular one, but reads k times
    the images: look at `images_read` and `stitched_fraction` when you compare. Ranks read different images and take
    rank 0's decision, a message of 8 bytes a step.

    Args:
        dataset: Map-style, with a length, of (image, target) pairs: what `stitch` takes.
        batch_size: n >= 1 [images that one rank's model sees in a regular batch].
        policy: Which kind comes next.
        feedback: What the policy looks at; None for one that looks at nothing.
        seed: Of the order; another one gives other batches.
        k: How many images share the pixels of one, >= 1.
        stitch: Makes of k n images and targets a stitched batch, in the workers; None is `stitch4` for k = 4, else
            `batch_stitch`. Whatever it is must pickle where workers are spawned.
        num_workers: Worker processes of each stream, >= 0.
        collate: Makes a batch of images and targets, in the workers; None gives the pair of lists.
        ranks: Who shares the data; None takes torch's default process group where there is one.

    Raises:
        InvalidArgument: A number is out of range, or a threshold has no feedback.
        EmptyDataset: The data set holds no image.
        UnsizedDataset: It has no length.

    Source: Chen et al. (2020), arXiv 2004.12432; two loaders used in turn are verified in the authors' public code.
    Differs from the paper: ranks agree, and a run can be resumed.

    Example:
        >>> target = {"boxes": torch.tensor([[8.0, 8.0, 24.0, 24.0]]), "labels": torch.tensor([1])}
        >>> dataset = [(torch.zeros(1, 32, 32), target)] * 10
        >>> feedback = LossShareFeedback(area_threshold=16**2)
        >>> batcher = ScaleBatcher(dataset, 2, ThresholdPolicy(0.1), feedback, seed=0)
        >>> for _ in range(4):
        ...     images, targets = next(batcher)
        ...     share = feedback.update_from_targets(targets)  # or feedback.update(losses, areas) of the positives
        >>> batcher.stitched_fraction, batcher.images_read  # stitched, regular, stitched, regular
        (0.5, 20)
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        policy: AbstractScalePolicy,
        feedback: LossShareFeedback | None,
        seed: int,
        k: int = 4,
        stitch: Stitch | None = None,
        num_workers: int = 0,
        collate: Collate | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        check_integer(1, batch_size=batch_size, k=k)
        check_integer(0, num_workers=num_workers)
        check_integer(-(2**63), seed=seed)
        if not isinstance(policy, AbstractScalePolicy):
            raise InvalidArgument(f"policy must be a scale policy such as ThresholdPolicy(0.1), got {policy!r}")
        if feedback is None and isinstance(policy, ThresholdPolicy):
            raise InvalidArgument("feedback must be given with a ThresholdPolicy, got None: it would never stitch")
        if not isinstance(dataset, Sized):
            raise UnsizedDataset(f"dataset must have a length, got {type(dataset).__name__}")
        if len(dataset) == 0:
            raise EmptyDataset("dataset holds no image")
        self.policy, self.feedback = policy, feedback
        self.batch_size, self.k = batch_size, k
        self.ranks = all_ranks(torch.accelerator.current_accelerator()) if ranks is None else ranks
        self.step = 0
        """Batches given so far."""
        self.stitched_steps = 0
        """How many of them were stitched."""
        self.images_read = 0
        """Images of the data set in the batches given so far on this rank; those fetched ahead do not count."""
        self.stitched = False
        """Whether the latest batch was stitched."""
        if stitch is None:
            stitch = stitch4 if k == 4 else partial(batch_stitch, k=k)
        collate = _pair if collate is None else collate

        def stream(seed: int, count: int, stitch: Stitch | None) -> ImageStream:
            order = SampleOrder(len(dataset), seed, rank=self.ranks.index, ranks=self.ranks.count)
            return ImageStream(dataset, order, count, MakeBatch(stitch, collate), num_workers)

        self._streams = {
            False: stream(seed, batch_size, None),
            True: stream(seed_for(seed, _STITCHED) >> 1, k * batch_size, stitch),
        }

    @property
    def stitched_fraction(self) -> float:
        """Share of the batches so far that were stitched; 0 before the first."""
        return self.stitched_steps / self.step if self.step else 0.0

    def __iter__(self) -> ScaleBatcher:
        """Return itself: going over it again goes on where it stands."""
        return self

    def __next__(self) -> Any:
        """Decide, and return a batch."""
        share = None if self.feedback is None else self.feedback.share
        own = self.policy.decide(share, self.step)
        stitched = bool(self.ranks.first(float(own))[0])
        stream = self._streams[stitched]
        batch = next(stream)
        self.stitched = stitched
        self.step += 1
        self.stitched_steps += stitched
        self.images_read += stream.count
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return where both streams stand, the counts and the feedback's state, as plain numbers."""
        return {
            **{name: getattr(self, name) for name in _COUNTS},
            "regular_stream": self._streams[False].cursor.state_dict(),
            "stitched_stream": self._streams[True].cursor.state_dict(),
            "feedback": None if self.feedback is None else self.feedback.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was saved, the feedback included: the same decisions and the same images follow.

        Args:
            state: What `state_dict` returned.

        Raises:
            InvalidArgument: An entry is missing, or the state belongs to another seed or data set.
        """
        for name in (*_COUNTS, "regular_stream", "stitched_stream", "feedback"):
            if name not in state:
                raise InvalidArgument(f"state of the batcher lacks {name!r}")
        if self.feedback is not None and state["feedback"] is None:
            raise InvalidArgument("state of the batcher holds no feedback, but this one has one: pass feedback=None")
        for stitched, name in ((False, "regular_stream"), (True, "stitched_stream")):
            self._streams[stitched].cursor.load_state_dict(state[name])
            self._streams[stitched].restart()
        for name in _COUNTS:
            setattr(self, name, state[name])
        if self.feedback is not None:
            self.feedback.load_state_dict(state["feedback"])

    def close(self) -> None:
        """End the workers of both streams; the next batch starts new ones."""
        for stream in self._streams.values():
            stream.close()
            stream.restart()


def _pair(images: Any, targets: Any) -> Any:
    return images, targets
