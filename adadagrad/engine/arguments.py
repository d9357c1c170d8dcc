"""What the engine's arguments must satisfy together, checked before any training."""

from __future__ import annotations

import inspect
import math
import os
from typing import TYPE_CHECKING

import torch
from torch import nn

from adadagrad.core.checks import check_choice, check_integer, check_positive
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.optimizing import Extrapolating, Reevaluating, TakesGradients
from adadagrad.core.protocols import BatchSizePolicy
from adadagrad.core.records import Observation
from adadagrad.core.settings import Bounds, Measure
from adadagrad.parallel import AbstractParallel
from adadagrad.policies.base import AbstractPolicy
from adadagrad.policies.bounds import check_bounds
from adadagrad.rates.base import AbstractRate

if TYPE_CHECKING:
    from adadagrad.engine.adaptive_batch import AdaptiveBatch

DEFAULT_BATCH_SIZE = 64
"""First batch size where neither the user nor a schedule names one."""


def check_types(model: object, optimizer: object, policy: object) -> None:
    """Refuse arguments in the wrong place and models that this version cannot train.

    Args:
        model: Must be a module with dense gradients.
        optimizer: Must be a torch optimizer.
        policy: Must be a policy's instance.

    Raises:
        InvalidArgument: One of them is not.
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgument(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidArgument(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    _refuse_sparse(model)
    if isinstance(policy, type):
        raise InvalidArgument(f"policy must be an instance, got the class: write {policy.__name__}()")
    if not isinstance(policy, AbstractPolicy):
        raise InvalidArgument(f"policy must be a policy such as NormTest(), got {policy!r}")


def check_settings(bounds: object, measure: object, rate: object, lr_schedule: object) -> None:
    """Refuse settings of another kind, and a schedule's class in the place of an instance.

    Args:
        bounds: None or `Bounds`.
        measure: None or `Measure`.
        rate: None or a learning-rate rule.
        lr_schedule: None or a function of samples.

    Raises:
        InvalidArgument: One of them is not.
    """
    for name, value, kind in (("bounds", bounds, Bounds), ("measure", measure, Measure)):
        if value is not None and not isinstance(value, kind):
            raise InvalidArgument(f"{name} must be {kind.__name__}(...) or None, got {value!r}")
    if isinstance(rate, type):
        raise InvalidArgument(f"rate must be an instance, got the class: write {rate.__name__}()")
    if rate is not None and not isinstance(rate, AbstractRate):
        raise InvalidArgument(f"rate must be a learning-rate rule such as AdaScale() or None, got {rate!r}")
    if isinstance(lr_schedule, type):
        raise InvalidArgument(f"lr_schedule must be an instance, got the class: write {lr_schedule.__name__}(...)")
    if lr_schedule is not None and not callable(lr_schedule):
        raise InvalidArgument(f"lr_schedule must be a schedule such as CosineSchedule(...), got {lr_schedule!r}")


def check_ranges(micro_batch_size: int, on_nonfinite: str, epoch_boundary: str, max_grad_norm: float | None) -> None:
    """Refuse values that no run can have.

    Args:
        micro_batch_size: At least 1.
        on_nonfinite: One of two words.
        epoch_boundary: One of two words.
        max_grad_norm: None or above 0.

    Raises:
        InvalidArgument: One of them is something else.
    """
    check_integer(1, micro_batch_size=micro_batch_size)
    check_choice("on_nonfinite", on_nonfinite, ("skip", "stop"))
    check_choice("epoch_boundary", epoch_boundary, ("cross", "short"))
    if max_grad_norm is not None:
        check_positive(max_grad_norm=max_grad_norm)


def check_saving(checkpoint_every: int | None, log_dir: str | os.PathLike[str] | None) -> None:
    """Refuse to save where there is no place for it.

    Args:
        checkpoint_every: None, or samples, at least 1.
        log_dir: The directory that checkpoints go to.

    Raises:
        InvalidArgument: It is out of range, or there is no directory.
    """
    if checkpoint_every is None:
        return
    check_integer(1, checkpoint_every=checkpoint_every)
    if log_dir is None:
        raise InvalidArgument("checkpoint_every needs log_dir, the directory to save in")


def sample_budget(total_samples: int | None, epochs: float | None, dataset_size: int) -> int:
    """Return the number of examples to train on.

    Args:
        total_samples: That number, or None.
        epochs: Or how many times the data set.
        dataset_size: N.

    Returns:
        The budget, at least 1.

    Raises:
        InvalidArgument: Both or neither are given, or the value is out of range.
    """
    if (total_samples is None) == (epochs is None):
        raise InvalidArgument("give either total_samples or epochs, for example epochs=10")
    if total_samples is not None:
        check_integer(1, total_samples=total_samples)
        return total_samples
    assert epochs is not None
    check_positive(epochs=epochs)
    return max(1, round(epochs * dataset_size))


def examples_in_all(parallel: AbstractParallel, size: int, epoch_boundary: str) -> int:
    """Return how many examples the ranks have to train on.

    Args:
        parallel: The ranks.
        size: Examples in this rank's data set.
        epoch_boundary: The user's, which own data sets have none of in common.

    Returns:
        N: that size, or the sum over ranks where each has its own.

    Raises:
        InvalidArgument: Batches are to end with an epoch that the ranks do not share.
    """
    if not parallel.own_data:
        return size
    if epoch_boundary == "short":
        raise InvalidArgument(
            'epoch_boundary="short" needs one epoch for all ranks, and each has a data set of its own: use "cross"'
        )
    return int(parallel.ranks.sum(float(size))[0])


def largest_batch(max_batch_size: int | None, dataset_size: int, total_samples: int) -> int:
    """Return the cap: what the user says, but never more than the data set or the budget holds.

    Args:
        max_batch_size: The user's cap, or None.
        dataset_size: N.
        total_samples: The budget.

    Returns:
        The cap.
    """
    limit = min(dataset_size, total_samples)
    if max_batch_size is None:
        return limit
    check_integer(1, max_batch_size=max_batch_size)
    return min(max_batch_size, limit)


def first_batch(
    policy: BatchSizePolicy, global_batch_size: int | None, max_batch_size: int | None, cap: int, bounds: Bounds
) -> int:
    """Return the first step's batch size: the schedule's, the user's, or the default.

    Args:
        policy: A schedule says what it wants before any sample; a test does not.
        global_batch_size: What the user says, or None.
        max_batch_size: The user's cap, or None.
        cap: The largest batch, which the data set and the budget bound too.
        bounds: For the multiple.

    Returns:
        The size, between 1 and the cap.

    Raises:
        InvalidArgument: The user's size contradicts the schedule's, the cap or the multiple, or data set and budget
            hold too little for it.
    """
    if global_batch_size is not None:
        check_integer(1, global_batch_size=global_batch_size)
    if policy.needs:
        size = global_batch_size
    else:
        start = policy.required_batch_size(Observation(global_batch_size=global_batch_size or DEFAULT_BATCH_SIZE))
        if not math.isfinite(start):
            raise InvalidArgument(f"policy must start at a finite batch size, but {policy!r} asks for {start}")
        size = max(1, math.ceil(start))
        if global_batch_size is not None and global_batch_size != size:
            raise InvalidArgument(
                f"global_batch_size={global_batch_size} contradicts {policy!r}, which starts at {size}: leave it out"
            )
    limited = max_batch_size is None or cap < max_batch_size  # by data set and budget, not by the user
    if size is not None and size > cap and not limited:
        raise InvalidArgument(
            f"{policy!r} starts at {size} examples, more than max_batch_size={cap}: raise max_batch_size or start lower"
        )
    if size is not None and size > cap:
        raise InvalidArgument(
            f"{policy!r} starts at {size} examples, but data set and budget hold {cap}: lower it or train on more"
            if global_batch_size is None
            else f"global_batch_size must not exceed the {cap} examples that data set and budget hold, got {size}"
        )
    if limited and bounds.multiple_of > cap:
        raise InvalidArgument(
            f"multiple_of must not exceed the {cap} examples that data set and budget hold, got {bounds.multiple_of}"
        )
    if size is None:
        size = max(bounds.multiple_of, min(DEFAULT_BATCH_SIZE, cap) // bounds.multiple_of * bounds.multiple_of)
    check_bounds(bounds, global_batch_size=size, max_batch_size=cap)
    return size


def smallest_allowed(min_batch_size: int | None, first: int) -> int:
    """Return the user's floor, which the first batch must respect.

    Args:
        min_batch_size: The floor, or None for 1.
        first: Examples of the first step.

    Returns:
        The floor.

    Raises:
        InvalidArgument: It is no integer >= 1, or above the first batch.
    """
    if min_batch_size is None:
        return 1
    check_integer(1, min_batch_size=min_batch_size)
    if min_batch_size > first:
        raise InvalidArgument(
            f"min_batch_size must be <= global_batch_size, got min_batch_size={min_batch_size} and "
            f"global_batch_size={first}: lower it, or start higher"
        )
    return min_batch_size


def check_optimizer(engine: AdaptiveBatch) -> None:
    """Refuse an optimizer that wants of the engine, or of its ranks, what they are not set up for.

    Args:
        engine: The engine; its optimizer, ranks, loss scale and `replay` are known.

    Raises:
        InvalidArgument: The optimizer needs a closure and there is no `replay`, or what is evaluated again would not be
            the same; or it needs gradients of each rank, or takes them away where ranks still average them.
    """
    optimizer, parallel, name = engine.optimizer, engine.parallel, type(engine.optimizer).__name__
    again = optimizer.needs_closure if isinstance(optimizer, Reevaluating) else needs_closure(optimizer)
    if again and not engine.replay:
        raise InvalidArgument(
            f"optimizer {name} needs a closure that evaluates a step's batch again: pass replay=True, or use an "
            "optimizer whose step() needs none, for example Adagrad"
        )
    if engine.replay and engine.scaling.enabled:
        raise InvalidArgument("replay does not go with grad_scaler: use bfloat16, which needs no loss scale")
    if engine.replay or isinstance(optimizer, Extrapolating):
        _refuse_changing_weights(engine.model, "replay" if engine.replay else name)
    together = parallel.ranks.count > 1 and parallel.gradient != "local"
    if isinstance(optimizer, Extrapolating) and optimizer.needs_local_gradients and together:
        raise InvalidArgument(
            f"optimizer {name} displaces each rank along its own past gradient, and is not shown it: call "
            "optimizer.keep_local_gradients(model) with the DistributedDataParallel model, or choose another perturb"
        )
    if isinstance(optimizer, TakesGradients) and optimizer.takes_gradients and together:
        raise InvalidArgument(
            f"optimizer {name} takes gradients out of .grad before the ranks have averaged them: pass "
            "free_gradients=False"
        )
    if isinstance(optimizer, TakesGradients) and optimizer.takes_gradients and engine.measuring.enabled:
        raise InvalidArgument(
            f"optimizer {name} takes gradients out of .grad, so that nothing can be measured of them: pass "
            "free_gradients=False, or choose a policy and a rate that measure nothing"
        )


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer such as LBFGS cannot step without a closure.

    Args:
        optimizer: Any torch optimizer.
    """
    parameters = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    return any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def _refuse_changing_weights(model: nn.Module, what: str) -> None:
    """Refuse embedding tables that a forward shortens: that would be undone with the place where it was evaluated."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm:
            raise InvalidArgument(
                f"{what} evaluates the model at other parameters and puts them back, and {name or 'the model'} "
                "changes its own weights in a forward: build it without max_norm"
            )


def _refuse_sparse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            raise InvalidArgument(
                f"model has sparse gradients at {name or 'its root'} ({type(module).__name__}), which are not "
                "supported: build it with sparse=False"
            )
