"""`AdaptiveBatchCallback`: from Lightning's hooks to the parts of an engine's step."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, final

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.protocols import BatchSizePolicy
from adadagrad.core.records import Decision
from adadagrad.core.settings import Bounds
from adadagrad.engine import AdaptiveBatch
from adadagrad.integrations.lightning.checks import check_settings, check_trainer
from adadagrad.integrations.lightning.loader import AdaptiveLoader
from adadagrad.integrations.lightning.module import measured_module, parallel_of
from adadagrad.integrations.lightning.place import move_to
from adadagrad.integrations.lightning.run import Run, Weight
from adadagrad.integrations.metrics import decision_metrics


@final
class AdaptiveBatchCallback(Callback):
    """Let each measured step choose the next batch size under Lightning's Trainer, in automatic optimization.

    The steps are those of an `AdaptiveBatch` with ``epoch_boundary="short"`` and batches that are multiples of the
    micro-batch on all ranks: the same order of the data, the same trace, the same weights to rounding. Lightning's
    logger gets `decision_metrics`, at the optimizer steps that the Trainer logs. Put it before callbacks that look at
    gradients or at ``outputs["loss"]``.

    Args:
        policy: Which batch size; for example ``NormTest(eta=0.5)``.
        global_batch_size: Examples of the first step over all ranks, a multiple of the micro-batch on all ranks; None
            for the loader's batch size, times ranks, times the Trainer's `accumulate_grad_batches`.
        bounds: What may become of a request; `multiple_of` is raised to a multiple of the micro-batch on all ranks.
        total_samples: The budget, after which training ends; None for `max_epochs` of the data set.
        weight: From a micro-batch to what its mean loss weighs: a number, or one for each example (n,). For language
            models the number of labels that count. None weighs examples equally.
        module: Name of the module in the LightningModule that `training_step` calls with the batch, and that holds all
            that is trained; it is measured. None finds it (`module.measured_module`).
        **settings: What else `AdaptiveBatch` takes: `max_batch_size`, `min_batch_size`, `measure`, `rate`,
            `lr_schedule`, `on_nonfinite`, `seed`, `log_dir`.

    Raises:
        InvalidArgument: A setting is the Trainer's; or, when training starts, the Trainer would make steps of its own
            (`checks.check_trainer`).
    """

    def __init__(
        self,
        policy: BatchSizePolicy,
        *,
        global_batch_size: int | None = None,
        bounds: Bounds | None = None,
        total_samples: int | None = None,
        weight: Weight | None = None,
        module: str | None = None,
        **settings: Any,
    ) -> None:
        check_settings(settings)
        self.policy, self.settings, self.weight, self.module = policy, settings, weight, module
        self.global_batch_size, self.total_samples = global_batch_size, total_samples
        self.bounds = Bounds() if bounds is None else bounds
        self.decision: Decision | None = None
        """The latest step's record."""
        self._run: Run | None = None
        self._loader: AdaptiveLoader | None = None
        self._loaded: dict[str, Any] = {}
        self._batch: Any = None
        self._divisor = 1

    def loader(self, loader: DataLoader[Any]) -> AdaptiveLoader:
        """Return what to give to `Trainer.fit`, or to return from `train_dataloader`, instead of a loader.

        Args:
            loader: The user's, over a data set with a length; its batch size becomes the micro-batch.

        Raises:
            InvalidArgument: It is something else.
        """
        self._loader = AdaptiveLoader(loader, self.run)
        return self._loader

    def run(self) -> Run | None:
        """Return the run at work, for the loader; None before training has started."""
        return self._run

    @property
    def engine(self) -> AdaptiveBatch | None:
        """The engine, once training has started."""
        return None if self._run is None else self._run.engine

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the engine, of a model that is wrapped by now, and go to where a checkpoint was taken."""
        optimizer, loader = check_trainer(trainer, pl_module, self._loader, self.total_samples)
        if trainer.ckpt_path is not None and not self._loaded:
            raise InvalidArgument(
                "the checkpoint holds no state of the callback, because it was made without it: load its weights alone "
                "(load_from_checkpoint) and train without ckpt_path"
            )
        model = measured_module(pl_module, self.module)
        parallel = parallel_of(trainer.strategy.model, model)
        parallel.whole = loader.micro_batch_size
        unit = loader.micro_batch_size * parallel.ranks.count
        first = self.global_batch_size
        if first is None and self.policy.needs:
            first = unit * trainer.accumulate_grad_batches
        engine = AdaptiveBatch(
            model,
            optimizer,
            loader.loader,
            self.policy,
            global_batch_size=first,
            bounds=replace(self.bounds, multiple_of=math.lcm(unit, self.bounds.multiple_of)),
            micro_batch_size=loader.micro_batch_size,
            total_samples=self.total_samples,
            epochs=trainer.max_epochs if self.total_samples is None else None,
            epoch_boundary="short",
            parallel=parallel,
            **self.settings,
        )
        counts, of_all = trainer.fit_loop.epoch_loop.batch_progress, trainer.check_val_every_n_epoch is None
        if self._loaded:
            engine.load_progress_state(self._loaded["engine"])
            move_to(trainer, engine, len(loader), again=self._loaded["again"] > 0)
            self._loaded = {}
        every = trainer.val_check_batch
        validates = math.inf if every is None or not trainer.enable_validation else every
        self._run = Run(engine, validates, counts.total.completed if of_all else None)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Have Lightning step the optimizer after this micro-batch, or not, as the engine has planned."""
        self._batch = batch
        self._divisor = trainer.accumulate_grad_batches = self._at_work.divisor(batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Give the loss, which Lightning has divided, its share of the step's mean."""
        if loss.requires_grad:  # else Lightning says what is wrong
            weights = None if self.weight is None else self.weight(self._batch)
            factor = self._at_work.factor(loss.detach() * self._divisor, weights) * self._divisor
            loss.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the micro-batch's measurement."""
        self._at_work.close()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Make the gradient the mean over the step's examples and take its statistics, before Lightning clips it."""
        self._at_work.step.prepare()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Decide and log, where the optimizer has made the step, and give ``outputs["loss"]`` its size back."""
        self._batch = None
        if not outputs:
            raise InvalidArgument("training_step must return a loss for every batch: return a loss times 0, not None")
        outputs["loss"] = outputs["loss"] * self._divisor
        decision = self._at_work.complete()
        if decision is not None:
            self.decision = decision
            if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
                metrics = decision_metrics(decision)
                pl_module.log_dict(dict(metrics), batch_size=1, logger=False)  # for callbacks; some milliseconds
                for logger in trainer.loggers:  # not by `log`, which repeats what another step has measured
                    logger.log_metrics(metrics, step=trainer.global_step - 1)
            trainer.should_stop |= self.total_samples is not None and self._at_work.over

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the log's last line, or give up the step in which training was stopped."""
        self._at_work.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the contexts of the step that has failed."""
        if self._run is not None:
            self._run.end()

    def state_dict(self) -> dict[str, Any]:
        """Return what Lightning's checkpoint keeps of the engine; on every rank."""
        return self._loaded if self._run is None else self._run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint holds until the engine is there."""
        self._loaded = state_dict

    @property
    def _at_work(self) -> Run:
        assert self._run is not None, "on_train_start comes first"
        return self._run
