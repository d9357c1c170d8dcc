"""`LocalSGD`: the ranks take several steps on their own, then average their models and decide the batch size."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adadagrad.core.checks import check_choice, check_integer
from adadagrad.core.comm import Ranks, all_ranks
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.records import GradientStatistics
from adadagrad.core.shards import is_sharded
from adadagrad.core.vectors import squared_norm
from adadagrad.parallel.base import AbstractParallel
from adadagrad.parallel.model_average import ModelAverage, OptimizerState


@final
class LocalSGD(AbstractParallel):
    r"""Let every rank take H steps of any optimizer by itself; then put the mean model in the place of all.

    A step's `global_batch_size` is over all ranks: each has b_loc = b / J examples of it. The ranks meet after every
    H-th step, where the batch size is decided, from

    .. math:: \hat\sigma^2 = \frac{b_{loc}}{J-1} \sum_w \|g_w - \bar g\|^2, \qquad
              T = \frac{\hat\sigma^2}{\eta^2 \|\bar g\|^2}

    with g_w the gradient of worker w in the round's last step: the norm test over the whole batch. In code: the
    estimator is `Worker()`, which ``"auto"`` chooses here, V is its `variance_trace` and T what `NormTest` asks for.
    It sends the gradient once a round, beside the model.

    Between meetings nothing is sent; a loss in the log is then rank 0's own, nothing is decided, and the engine cannot
    be saved. A rank whose gradient is not finite leaves out its own update and counts for nothing in the mean; its
    examples are taken off `samples_seen` at the meeting, and ``on_nonfinite="stop"`` stops all ranks there.

    When to use it: where messages take longer than steps. What breaks it: the ranks' models part between meetings, so
    that many local steps at a high learning rate train worse than as many synchronous ones. Data that differ from rank
    to rank make the ranks' gradients differ however large the batch is, and T runs to the cap: measure inside each rank
    then, with an explicit `PerExample()` or `MicroBatch()`.

    Args:
        model: The plain module; all ranks begin with rank 0's weights.
        optimizer: Its optimizer.
        local_steps: H, steps from one meeting to the next, >= 1; or a function of the samples seen that returns it,
            the same on all ranks. 1 averages after every step, which for SGD equals synchronous training.
        optimizer_state: ``"average"`` its state with the model, ``"local"``: each rank keeps its own, or ``"reset"``:
            it begins anew after every meeting.
        noise: ``"gradients"``, or ``"drifts"``: V and s from how far the models have moved in the round,
            u_w = (x_k - x_w) / H, with no vector beside the model. In units of a step, not of the gradient: for
            tests that read their ratio alone. Experimental, because an optimizer's own scaling is in it.
        own_data: Whether the engine is given another data set on every rank, all of which the rank reads. Every rank
            has an equal part of every step, whatever the sizes of the sets, and `dataset_size` is their sum.

    Raises:
        InvalidArgument: An argument is out of range, or the model is wrapped or sharded.

    Source: Lau, Li, Xu, Liu, Kolar (2024), arXiv 2406.13936 (the test from memory, unverified (medium); it agrees with
        the public AdLoCo code). The rule for data that differ, and the drifts: this project (derived). Differs from
        the paper: ranks weigh by their examples in the mean, so that an uneven batch is exact for H = 1.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> parallel = LocalSGD(model, optimizer, local_steps=4)  # for AdaptiveBatch(..., parallel=parallel)
        >>> parallel.ranks.count
        1
    """

    gradient: ClassVar[Literal["shared", "sharded", "local"]] = "local"
    aligned: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        local_steps: int | Callable[[int], int] = 8,
        *,
        optimizer_state: OptimizerState = "average",
        noise: Literal["gradients", "drifts"] = "gradients",
        own_data: bool = False,
    ) -> None:
        if not callable(local_steps):
            check_integer(1, local_steps=local_steps)
        check_choice("optimizer_state", optimizer_state, ("average", "local", "reset"))
        check_choice("noise", noise, ("gradients", "drifts"))
        if isinstance(model, DistributedDataParallel) or any(is_sharded(p) for p in model.parameters()):
            raise InvalidArgument(
                "model is wrapped or sharded, and LocalSGD averages plain modules: give it the module itself"
            )
        self._model, self._steps, self._noise, self._own_data = model, local_steps, noise, own_data
        self._ranks = all_ranks(next((p.device for p in model.parameters()), None))
        if noise == "drifts" and self._ranks.count < 2:
            raise InvalidArgument('noise="drifts" compares several ranks, and there is one: use noise="gradients"')
        self._average = ModelAverage(model, optimizer, self._ranks, optimizer_state)
        self._own_state = optimizer_state == "local" and self._ranks.count > 1
        self._average.share_first()
        self._first = self._last = self._number = 0  # steps of the round, and the present one
        self._weight, self._examples = 0.0, 0  # of this rank's applied steps in the round
        self._start: list[Tensor] = []  # the model where the round began, for drifts
        self.rounds = 0
        """How often the ranks have met."""
        self._bytes_before = -self._ranks.bytes_sent

    @property
    def module(self) -> nn.Module:
        """The model itself."""
        return self._model

    @property
    def ranks(self) -> Ranks:
        """All ranks of the default process group."""
        return self._ranks

    @property
    def meets(self) -> bool:
        """Whether the present step is the last one of its round."""
        return self._number == self._last

    @property
    def together(self) -> bool:
        """Whether no local step has been made since the ranks met."""
        return self._first == 0

    @property
    def shows_noise(self) -> bool:
        """Whether the drifts tell the noise."""
        return self._noise == "drifts"

    @property
    def own_optimizer_state(self) -> bool:
        """Whether every rank keeps its own."""
        return self._own_state

    @property
    def own_data(self) -> bool:
        """Whether every rank has a data set of its own."""
        return self._own_data

    @property
    def bytes_sent(self) -> int:
        """What this rank has handed over in this run: models, states, gradients, and a few numbers a round."""
        return self._bytes_before + self._ranks.bytes_sent

    def begin_step(self, number: int, samples_seen: int) -> None:
        """Begin a round, if none is under way.

        Args:
            number: The step's number.
            samples_seen: Examples before it.

        Raises:
            InvalidArgument: The function `local_steps` returned no integer >= 1.
        """
        self._number = number
        if self._first == 0:
            steps = self._steps(samples_seen) if callable(self._steps) else self._steps
            check_integer(1, local_steps=steps)
            self._first, self._last, self._weight, self._examples = number, number + steps - 1, 0.0, 0
            if self._noise == "drifts":
                self._start = [p.detach().clone() for p in self._trained]

    def occasion(self, number: int) -> int:
        """Return the number of the round."""
        return self.rounds + 1

    def micro_batch(self, *, last: bool, measured: bool) -> AbstractContextManager[None]:
        """Return a context that does nothing: gradients stay where they are."""
        return nullcontext()

    def after_update(self, examples: int, weight: float) -> GradientStatistics | None:
        """Count the step, and average the models at the end of its round.

        Args:
            examples: This rank's in the step; 0 where its update was left out.
            weight: What they weigh in the mean: their number, or their weights in sum.

        Returns:
            What the drifts say, at a meeting; None where they are not read.
        """
        self._examples += examples
        self._weight += weight
        return self._meet() if self.meets else None

    def finish(self) -> None:
        """Average the models of a round that the end of the run has cut short."""
        if not self.together:
            self._meet()

    def log_fields(self) -> dict[str, float]:
        """Return the rounds and bytes so far."""
        return {"rounds": self.rounds, "bytes_sent": self.bytes_sent}

    def state_dict(self) -> dict[str, float]:
        """Return the rounds and bytes so far; the ranks are together then."""
        return self.log_fields()

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on counting, from the beginning of a round; from 0 where another way of training was saved."""
        self.rounds = int(state.get("rounds", 0))
        self._bytes_before = int(state.get("bytes_sent", 0)) - self._ranks.bytes_sent
        self._first = self._last = self._number = 0

    @property
    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self._model.parameters() if p.requires_grad]

    def _meet(self) -> GradientStatistics | None:
        steps, start, self._start = self._number - self._first + 1, self._start, []
        n, w, moved, self._first = self._examples, self._weight, self._moved(start), 0
        self._average.form(w)
        self.rounds += 1
        if not start:
            return None
        count, total, weights, squares = self._ranks.sum(float(n > 0), float(n), w, w * moved)
        if count < 2:
            return None
        mean_moved = self._moved(start)
        return GradientStatistics(
            num_examples=max(round(total / steps), 1),
            grad_norm_sq=mean_moved / steps**2,
            variance_trace=total * max(squares / weights - mean_moved, 0.0) / (count - 1) / steps**2,
            num_units=int(count),
            kind="drift",
            weight_sq_sum=1 / total,
        )

    def _moved(self, start: list[Tensor]) -> float:
        r"""Return \|x - x_k\|^2 of this rank's present model."""
        with torch.no_grad():
            return float(squared_norm([p - x for p, x in zip(self._trained, start, strict=True)])) if start else 0.0
