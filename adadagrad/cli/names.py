"""What the names on the command line stand for: the tables from names to classes; those of optimizers are beside it.

To make a new policy, schedule or model known to the command line, add a row here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from adadagrad.cli.config import BatchOptions, OptimizerOptions, PolicyOptions
from adadagrad.cli.data import DataSource
from adadagrad.cli.models import cnn, logistic, mlp
from adadagrad.cli.objects import call_object, is_object_name
from adadagrad.core.errors import InvalidArgument, UnknownName
from adadagrad.core.protocols import LearningRateSchedule
from adadagrad.policies import (
    CABS,
    AugmentedInnerProductTest,
    BigBatch,
    ConstantBatch,
    CoordinateNormTest,
    DiveBatch,
    GeometricBatch,
    GradientNoiseScale,
    InnerProductTest,
    LinearBatch,
    NormTest,
    RecordedBatch,
    StagedBatch,
)
from adadagrad.policies.base import AbstractPolicy
from adadagrad.rates import ConstantSchedule, CosineSchedule, LinearSchedule, StepSchedule

Row = TypeVar("Row")

POLICIES: Mapping[str, Callable[[BatchOptions, PolicyOptions], AbstractPolicy]] = {
    "norm": lambda b, p: NormTest(eta=p.eta, finite_population=p.finite_population),
    "inner-product": lambda b, p: InnerProductTest(theta=p.theta, finite_population=p.finite_population),
    "augmented": lambda b, p: AugmentedInnerProductTest(theta=p.theta, nu=p.nu, finite_population=p.finite_population),
    "coordinate": lambda b, p: CoordinateNormTest(
        eta=p.eta,
        reduction=p.reduction,
        quantile=p.quantile if p.reduction == "quantile" else None,
        finite_population=p.finite_population,
    ),
    "noise-scale": lambda b, p: GradientNoiseScale(fraction=p.fraction, averaging=p.averaging),
    "cabs": lambda b, p: CABS(scale=p.cabs_scale, loss_offset=p.loss_offset, averaging=p.averaging),
    "divebatch": lambda b, p: DiveBatch(delta=p.delta),
    "big-batch": lambda b, p: BigBatch(increment=p.increment, eta=p.eta),
    "constant": lambda b, p: ConstantBatch(b.global_batch_size),
    "staged": lambda b, p: StagedBatch(_given(p.stages, "stages", "--policy staged")),
    "linear": lambda b, p: LinearBatch(
        start=b.global_batch_size,
        end=_given(p.end_batch_size, "end-batch-size", "--policy linear"),
        ramp_samples=_given(p.ramp_samples, "ramp-samples", "--policy linear"),
        increment=p.increment,
    ),
    "geometric": lambda b, p: GeometricBatch(
        start=b.global_batch_size,
        factor=p.factor,
        every_samples=_given(p.every_samples, "every-samples", "--policy geometric"),
        end=p.end_batch_size,
    ),
    "recorded": lambda b, p: RecordedBatch.from_log(_given(p.plan, "plan", "--policy recorded")),
}

SCHEDULES: Mapping[str, Callable[[OptimizerOptions], LearningRateSchedule]] = {
    "constant": lambda o: ConstantSchedule(),
    "cosine": lambda o: CosineSchedule(warmup_samples=o.warmup_samples, floor=o.lr_floor),
    "linear": lambda o: LinearSchedule(warmup_samples=o.warmup_samples, floor=o.lr_floor),
    "step": lambda o: StepSchedule(_milestones(_given(o.lr_milestones, "lr-milestones", "--lr-schedule step"))),
}

MODELS: Mapping[str, Callable[[tuple[int, ...], int], nn.Module]] = {"logistic": logistic, "mlp": mlp, "cnn": cnn}


def make_policy(batch: BatchOptions, options: PolicyOptions) -> AbstractPolicy:
    """Make the policy that ``--policy`` names, other than the recommended, from its parameters among the options."""
    if batch.policy not in POLICIES:
        raise UnknownName("policy", batch.policy, ("recommended", *POLICIES))
    return POLICIES[batch.policy](batch, options)


def make_schedule(options: OptimizerOptions) -> LearningRateSchedule | None:
    """Make the schedule that ``--lr-schedule`` names; None for a constant learning rate."""
    schedule = find("lr-schedule", options.lr_schedule, SCHEDULES)(options)
    return None if isinstance(schedule, ConstantSchedule) else schedule


def make_model(spec: str, data: DataSource) -> nn.Module:
    """Make the model that ``--model`` names; one of ours fits itself to the data.

    Args:
        spec: A name, or ``package.module:function``.
        data: The data.

    Returns:
        The model, with weights from torch's global random state.

    Raises:
        InvalidArgument: A user's function does not return a module, or the model does not fit the data.
        UnknownName: There is no such model.
    """
    if is_object_name(spec):
        model = call_object(spec, "model")
        if not isinstance(model, nn.Module):
            raise InvalidArgument(f"--model {spec} must return a torch.nn.Module, got {type(model).__name__}")
        return model
    return find("model", spec, MODELS)(data.input_shape(), data.num_classes())


def find(what: str, name: str, table: Mapping[str, Row]) -> Row:
    """Look a name up.

    Args:
        what: What it names, for the message.
        name: The name.
        table: The names that exist.

    Returns:
        The row.

    Raises:
        UnknownName: The name is not in the table; the message lists the nearest.
    """
    if name not in table:
        raise UnknownName(what, name, table)
    return table[name]


def _given(value: Any, flag: str, choice: str) -> Any:
    """The value of an option that one choice cannot do without."""
    if value is None:
        raise InvalidArgument(f"--{flag} must be given with {choice}")
    return value


def _milestones(text: str) -> list[tuple[int, float]]:
    """Read ``"20000:0.1 40000:0.01"`` as pairs (samples, factor)."""
    pairs = []
    for entry in text.replace(",", " ").split() or [""]:
        samples, _, factor = entry.partition(":")
        try:
            pairs.append((int(samples), float(factor)))
        except ValueError as error:
            raise InvalidArgument(f'--lr-milestones must be like "20000:0.1 40000:0.01", got {entry!r}') from error
    return pairs
