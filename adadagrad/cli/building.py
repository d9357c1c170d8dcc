"""From settings to an engine before its first step, and everything refused that cannot work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adadagrad.cli.config import Settings
from adadagrad.cli.data import DataSource
from adadagrad.cli.fit import check_data, check_fit
from adadagrad.cli.names import make_model, make_policy, make_schedule
from adadagrad.cli.optimizers import make_optimizer
from adadagrad.cli.rates import make_rate
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.optimizing import Reevaluating
from adadagrad.core.settings import Bounds, Measure
from adadagrad.engine import AdaptiveBatch
from adadagrad.engine.recommended import GROWTH, OVERHEAD, recommended
from adadagrad.optimizers import ExtrapolatedSGD
from adadagrad.parallel.starting import data_parallel, local_device
from adadagrad.policies import GradientNoiseScale
from adadagrad.policies.base import AbstractPolicy


def make_engine(
    settings: Settings, data: DataSource, directory: Path | None, policy: AbstractPolicy | None = None
) -> AdaptiveBatch:
    """Build model, optimizer, policy and engine; seeds torch's global random state first.

    Args:
        settings: All choices.
        data: The data that they name.
        directory: Where the log goes; None for no log.
        policy: In place of the one that the settings name.

    Returns:
        The engine before its first step.

    Raises:
        InvalidArgument: A setting is out of range, or contradicts another one or the data.
    """
    run, batch, chosen, measure = settings.run, settings.batch, settings.optimizer, settings.measure
    if not -(2**63) <= run.seed < 2**63:
        raise InvalidArgument(f"seed must be a 64-bit integer, got {run.seed}")
    check_data(data)
    torch.manual_seed(run.seed)
    model = _moved(make_model(settings.problem.model, data), run.device)
    check_fit(model, settings.problem.model, data)
    optimizer = make_optimizer(model, chosen)
    named, min_batch_size, bounds = _choice(settings, optimizer)
    policy = named if policy is None else policy
    if chosen.rate == "recommended":
        # Linear scaling is right near the noise scale; the tests ask for many times as much.
        rate = recommended(optimizer)["rate"] if isinstance(policy, GradientNoiseScale) else None
    else:
        rate = make_rate(optimizer, chosen)
    budget: dict[str, Any] = {"epochs": run.epochs} if run.samples is None else {"total_samples": run.samples}
    whole = data_parallel(model, run.device)
    if isinstance(whole, DistributedDataParallel) and isinstance(optimizer, ExtrapolatedSGD):
        optimizer.keep_local_gradients(whole)
    return AdaptiveBatch(
        whole,
        optimizer,
        data.train,
        policy=policy,
        global_batch_size=None if batch.policy in ("staged", "recorded") else batch.global_batch_size,
        min_batch_size=min_batch_size,
        max_batch_size=batch.max_batch_size,
        micro_batch_size=batch.micro_batch_size,
        measure=Measure(
            every=measure.measure_every,
            max_overhead=_overhead(settings),
            max_examples=None if measure.max_examples == "all" else measure.max_examples,
        )
        if policy.needs or (rate is not None and rate.needs)
        else None,
        bounds=bounds,
        rate=rate,
        lr_schedule=make_schedule(chosen),
        replay=isinstance(optimizer, Reevaluating) and optimizer.needs_closure,
        max_grad_norm=chosen.max_grad_norm,
        on_nonfinite=run.on_nonfinite,
        seed=run.seed,
        log_dir=directory,
        **budget,
    )


def _choice(settings: Settings, optimizer: torch.optim.Optimizer) -> tuple[AbstractPolicy, int | None, Bounds]:
    """Return the policy, its smallest batch and its bounds; what is not given is the recommended, under that policy."""
    batch = settings.batch
    averaged = batch.policy in ("recommended", "noise-scale")
    bounds = Bounds(
        max_growth=GROWTH if averaged and batch.max_growth is None else batch.max_growth,
        multiple_of=batch.multiple_of,
        on_infinite=batch.on_infinite,
        confidence=batch.confidence,
    )
    if batch.policy != "recommended":
        return make_policy(batch, settings.policy), batch.min_batch_size, bounds
    choice = recommended(optimizer, global_batch_size=batch.global_batch_size)
    smallest = choice["min_batch_size"] if batch.min_batch_size is None else batch.min_batch_size
    return choice["policy"], smallest, bounds


def _overhead(settings: Settings) -> float:
    """Return what measuring may take, where nothing is given by the policy."""
    given = settings.measure.max_overhead
    if given is not None:
        return given
    return OVERHEAD if settings.batch.policy == "recommended" else Measure().max_overhead


def _moved(model: nn.Module, device: str) -> nn.Module:
    if device == "meta":
        raise InvalidArgument("--device meta holds no numbers: choose cpu or cuda")
    try:
        return model.to(local_device(device))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidArgument(f"--device {device} cannot be used here: {reason}") from error
