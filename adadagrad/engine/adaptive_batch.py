"""`AdaptiveBatch`: a training loop whose batch size follows what its gradient shows."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adadagrad.batching import Assembler, make_plan, make_source
from adadagrad.checkpoint import CheckpointStore
from adadagrad.checkpoint.store import read, write
from adadagrad.core.errors import CorruptCheckpoint
from adadagrad.core.mixing import seed_for
from adadagrad.core.protocols import Accelerating, BatchSizePolicy, LearningRateRule, LearningRateSchedule
from adadagrad.core.settings import Bounds, Measure
from adadagrad.engine.accelerated import accelerated, enrol
from adadagrad.engine.arguments import (
    check_optimizer,
    check_ranges,
    check_saving,
    check_settings,
    check_types,
    examples_in_all,
    first_batch,
    largest_batch,
    sample_budget,
    smallest_allowed,
)
from adadagrad.engine.confidence import check_confidence
from adadagrad.engine.gradients import Gradients
from adadagrad.engine.learning_rate import LearningRate
from adadagrad.engine.local_step import LeftOut
from adadagrad.engine.log_records import metrics_record
from adadagrad.engine.loop import begin, every_step
from adadagrad.engine.measuring import Measuring
from adadagrad.engine.retry import Changing
from adadagrad.engine.run_log import RunLog
from adadagrad.engine.saving import (
    as_now,
    checkpoint,
    engine_state,
    progress_state,
    restore_engine,
    restore_progress,
    resume,
)
from adadagrad.engine.scaling import LossScale
from adadagrad.engine.splitting import Share
from adadagrad.engine.step import Step
from adadagrad.parallel import AbstractParallel, recognise
from adadagrad.policies.bounds import check_bounds


class AdaptiveBatch:
    r"""Train with a batch size that each measured step may change.

    Iterating yields one `Step` per optimizer step until `total_samples` have been used. The gradient that the
    optimizer sees is the mean over exactly the planned examples, however they are split into micro-batches; a
    new batch size takes effect at the next step, with the same data workers.

    Args:
        model: The module to train: a plain one, one in DistributedDataParallel, or one that `fully_shard` has sharded.
            Batches are moved to the device of its first parameter.
        optimizer: Any torch optimizer over exactly the model's trainable parameters.
        data: A map-style data set (shuffled), or a DataLoader (its workers, collation and shuffling are used, its
            batch size is not).
        policy: What asks for batch sizes, for example ``NormTest(eta=0.25)``.
        global_batch_size: Examples in the first step; None is 64, or what a schedule says.
        min_batch_size: Smallest batch that a policy may shrink to; None is the smallest that can be measured.
        max_batch_size: Largest batch; None, and anything larger, is the size of the data set.
        micro_batch_size: Most examples in one forward, the bound on memory; also the workers' chunk.
        total_samples: Examples to train on in total.
        epochs: Instead of `total_samples`: that many times the data set.
        measure: How, how often and on how many examples noise is measured. None measures what the policy needs.
        bounds: What may become of a requested size; see `Bounds`.
        rate: Which learning rate goes with the batch size, for example `AdaScale()`; None leaves it alone. The
            optimizer's own rates are those of the rule's `base_batch_size`, or else of the first batch. Under a rule
            that counts progress itself (`AdaScale` does) `total_samples` is the budget of that progress, and the run
            may use more examples.
        lr_schedule: Factor on every group's initial learning rate as a function of samples, or of the rule's progress,
            for example `CosineSchedule`. No other scheduler may own the learning rate beside it or a `rate`.
        parallel: How a step runs on many processes, where the model does not say it, as `LocalSGD`. On ranks above 0
            torch's random generator is seeded anew from its state and the rank, so that dropout differs between ranks.
        accelerator: The `accelerate.Accelerator` that has prepared model and optimizer; its checkpoints then hold how
            far the engine is. See `adadagrad.integrations.accelerate`.
        grad_scaler: Scales losses for float16 autocast, which `loss_function` opens. Statistics and clipping see the
            gradient without the scale; a step that overflows is drawn and not seen, and no ``on_nonfinite="stop"``.
        max_grad_norm: Clip the gradient to this norm, after the statistics; None does not clip.
        replay: Keep a step's micro-batches until `update`, which hands the optimizer a closure that evaluates them
            again: for `MARS(mode="exact")`, LBFGS. Needs `Step.run`.
        on_nonfinite: ``"skip"`` leaves out the update of a step whose loss or gradient is not finite,
            ``"stop"`` raises `NonFiniteGradient` before it.
        epoch_boundary: ``"cross"`` lets a batch span two epochs; ``"short"`` cuts it at the end of the epoch,
            and a cut batch decides nothing.
        seed: Seeds the order of the data and its random augmentation; not the model.
        log_dir: Directory for ``run.jsonl`` and checkpoints, made if need be; None writes nothing.
        checkpoint_every: Save into ``log_dir/checkpoints`` whenever so many samples have been seen since the last, and
            when SIGTERM or SIGINT has told a rank to stop: all ranks then finish the step and exit with status 143.
        keep_checkpoints: How many of the newest are kept there.

    Raises:
        InvalidArgument: An argument is out of range or contradicts another one; the message names both.

    Example:
        >>> import torch, adadagrad as ada
        >>> data = torch.utils.data.TensorDataset(torch.randn(512, 4), torch.randn(512, 1))
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
        >>> engine = ada.AdaptiveBatch(model, optimizer, data, ada.NormTest(eta=0.5), total_samples=2048)
        >>> for step in engine:
        ...     step.run(lambda batch: (model(batch[0]) - batch[1]).square().mean())
        ...     decision = step.update()
        >>> engine.samples_seen
        2048
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: Any,
        policy: BatchSizePolicy,
        *,
        global_batch_size: int | None = None,
        min_batch_size: int | None = None,
        max_batch_size: int | None = None,
        micro_batch_size: int = 256,
        total_samples: int | None = None,
        epochs: float | None = None,
        measure: Measure | None = None,
        bounds: Bounds | None = None,
        rate: LearningRateRule | None = None,
        lr_schedule: LearningRateSchedule | None = None,
        parallel: AbstractParallel | None = None,
        accelerator: Accelerating | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        max_grad_norm: float | None = None,
        replay: bool = False,
        on_nonfinite: Literal["skip", "stop"] = "skip",
        epoch_boundary: Literal["cross", "short"] = "cross",
        seed: int = 0,
        log_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        keep_checkpoints: int = 3,
    ) -> None:
        check_types(model, optimizer, policy)
        check_settings(bounds, measure, rate, lr_schedule)
        check_ranges(micro_batch_size, on_nonfinite, epoch_boundary, max_grad_norm)
        check_saving(checkpoint_every, log_dir)
        optimizer, data, grad_scaler = accelerated(accelerator, model, optimizer, data, grad_scaler)
        self.model, self.optimizer, self.policy = model, optimizer, policy
        self.parallel = recognise(model, parallel)
        self.scaling = LossScale(grad_scaler, self.parallel)
        self.replay = replay
        self.differentiate: Callable[[Tensor], None] = (
            Tensor.backward
        )  # of a micro-batch's loss; a host may have its own
        ranks = self.parallel.ranks
        self.bounds = Bounds() if bounds is None else bounds
        check_confidence(self.bounds, policy, measure)
        self.micro_batch_size, self.max_grad_norm, self.seed = micro_batch_size, max_grad_norm, seed
        self.on_nonfinite, self.epoch_boundary = on_nonfinite, epoch_boundary
        self._assembler = Assembler(
            make_source(
                data,
                seed=seed,
                chunk_size=micro_batch_size,
                rank=ranks.index,
                ranks=ranks.count,
                own_data=self.parallel.own_data,
            )
        )
        order = self._assembler.source.order
        self.dataset_size = order.total = examples_in_all(self.parallel, order.size, epoch_boundary)
        self.total_samples = sample_budget(total_samples, epochs, self.dataset_size)
        if max_batch_size is not None and global_batch_size is not None:
            check_bounds(self.bounds, global_batch_size=global_batch_size, max_batch_size=max_batch_size)
        self.max_batch_size = largest_batch(max_batch_size, self.dataset_size, self.total_samples)
        self.global_batch_size = first_batch(
            policy, global_batch_size, max_batch_size, self.max_batch_size, self.bounds
        )
        make_plan(self.global_batch_size, micro_batch_size, ranks.count)  # refuses ranks without an example
        self.min_batch_size = max(ranks.count, smallest_allowed(min_batch_size, self.global_batch_size))
        self._gradients = Gradients(self.parallel.module, optimizer)
        self.learning_rate = LearningRate(
            optimizer,
            lr_schedule,
            rate,
            first_batch_size=self.global_batch_size,
            dataset_size=self.dataset_size,
            total_samples=self.total_samples,
        )
        if not self.learning_rate.counts_progress:
            self._assembler.source.stop = self._assembler.source.order.before(self.total_samples)
        sure = self.bounds.confidence is not None
        self.measuring = Measuring(
            self.parallel, optimizer, policy, measure, rate=rate, dataset_size=self.dataset_size, errors=sure
        )
        self.measuring.refuse_small(self.global_batch_size)
        self.measuring.refuse_large(self.max_batch_size, micro_batch_size)
        check_optimizer(self)
        self.samples_seen = self.samples_drawn = self.steps = self.skipped = 0
        self.nonfinite_requests = 0  # of the policy; they never change the batch size, but for `on_infinite="cap"`
        self.seconds = 0.0
        self._skipped_in_a_row = 0
        self.left_out = LeftOut()  # this rank's, under local steps
        self.stop_requested = self.stop_agreed = False  # on this rank, and by all after a step in which one was
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.changing = Changing(self.parallel.module)
        self.memory_retries = 0  # steps repeated in smaller micro-batches because memory had run out
        self._started = time.perf_counter()
        self._begun = self._compiled = False
        self._step: Step | None = None
        self._log = RunLog(log_dir if ranks.index == 0 else None)
        if ranks.index > 0:
            torch.manual_seed(seed_for(torch.initial_seed(), ranks.index))
        self._checkpoint_every, self._last_checkpoint = checkpoint_every, 0
        self._store = CheckpointStore(Path(log_dir or ".") / "checkpoints", keep_checkpoints, ranks)
        self._has_directory = log_dir is not None
        enrol(self, accelerator)

    def __iter__(self) -> Iterator[Step]:
        """Return one step after the other until the budget of samples is used.

        Returns:
            An iterator over the steps to run and update. Leaving the loop in the middle of a step, or an error before
            its optimizer has stepped, undoes the step: its gradient is gone, and its examples come again. (What the
            forward has changed stays: random states, BatchNorm's running statistics.)

        Raises:
            StepError: The last step was not updated, or another loop over this engine is in the middle of one.
            SystemExit: A signal has told a rank to stop, and `checkpoint_every` is given.
            InvalidArgument: `log_dir` holds the log of another run.
        """
        return every_step(self)

    @property
    def progress(self) -> float:
        """How much of `total_samples` is done, in examples: `samples_seen`, or what the rate's rule counts instead."""
        return self.learning_rate.progress

    def log(self, metrics: Mapping[str, float]) -> None:
        """Add a line of metrics to run.jsonl, at the present number of samples.

        Args:
            metrics: Numbers by name, for example ``{"val/accuracy": 0.93}``.

        Raises:
            InvalidArgument: A metric is no number, or `log_dir` holds the log of another run.
        """
        record = metrics_record(self, metrics)
        begin(self)
        self._log.write("log", record)
        if self._step is None:  # outside the loop, which closes the file when it ends
            self._log.close()

    def explain(self) -> str:
        """Return which rule measures which layer, what that is expected to cost, and how often a step is measured."""
        return self.measuring.explain(self.share(self.global_batch_size), self.micro_batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that resuming needs: model, optimizer, random states, position, sizes.

        As in torch, the tensors of model and optimizer are the live ones: `copy.deepcopy` what is to be gone back to
        later in the same process, or `save` it.

        Returns:
            Nested dicts and lists of tensors, numbers and words.

        Raises:
            StepError: A step is in progress.
        """
        return engine_state(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where another engine's state was taken, and cut its log back to there.

        Args:
            state: What `state_dict` returned, for the same model, optimizer, data set and seed.

        Raises:
            StepError: A step is in progress.
            InvalidArgument: The state is incomplete, or belongs to another stream of data, model, optimizer or
                learning-rate rule, or `log_dir` holds the log of another run.
        """
        restore_engine(self, state)

    def progress_state(self) -> dict[str, Any]:
        """Return `state_dict` without the model and the optimizer, where somebody else saves those two.

        Returns:
            Nested dicts and lists of tensors, numbers and words.

        Raises:
            StepError: A step is in progress.
            InvalidArgument: The optimizer keeps a state of its own on every rank, which nobody else would save.
        """
        return progress_state(self)

    def load_progress_state(self, state: Mapping[str, Any]) -> None:
        """Continue where `progress_state` was taken, once model and optimizer are as they were then.

        Args:
            state: What `progress_state` returned.

        Raises:
            StepError: A step is in progress.
            InvalidArgument: As for `load_state_dict`.
        """
        restore_progress(self, state)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file, whole or not at all; to be called on every rank, of which the first one writes.

        Of a sharded model it is a folder, to which every rank writes its shards.

        Args:
            path: The file or folder; an older one is replaced.
        """
        write(Path(path), {"engine": self.state_dict()}, self.parallel.ranks)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continue from a file that `save` wrote.

        Args:
            path: The file.

        Raises:
            CorruptCheckpoint: The file is missing, damaged, or no checkpoint of an engine.
            StepError: A step is in progress.
            InvalidArgument: As for `load_state_dict`.
        """
        content = read(Path(path), as_now(self), self.parallel.ranks)
        if "engine" not in content:
            raise CorruptCheckpoint(f"{path} is a checkpoint, but not of an engine: use a file that engine.save wrote")
        self.load_state_dict(content["engine"])

    def checkpoint(self) -> None:
        """Save into ``log_dir/checkpoints`` now, between two steps; on every rank.

        Raises:
            InvalidArgument: There is no `log_dir`.
            StepError: A step is in progress.
        """
        checkpoint(self)

    def resume(self) -> bool:
        """Continue from the newest good checkpoint in ``log_dir/checkpoints``; on every rank, before the first step.

        A script that calls it after making the engine can be killed and started again as often as need be. A newer
        checkpoint that is damaged is named in a warning and passed over. Where nothing has been saved yet the run
        begins anew, and what an attempt before has logged is dropped.

        Returns:
            Whether there was one.

        Raises:
            InvalidArgument: There is no `log_dir`, or as for `load_state_dict`.
            CorruptCheckpoint: There are checkpoints, and none of them can be read.
            StepError: A step is in progress.
        """
        return resume(self)

    def share(self, size: int) -> Share:
        """Return who has which part of the next examples of the stream; for the loop.

        Args:
            size: How many there are, over all ranks.
        """
        parallel = self.parallel
        apart = parallel.gradient != "shared"
        whole = parallel.whole > 0
        return Share(self._assembler.source.order, self.samples_drawn, size, parallel.aligned or whole, apart, whole)
