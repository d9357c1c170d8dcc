"""Bad input: a typed error that names the argument and the remedy, before any training."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Subset, TensorDataset, WeightedRandomSampler

import adadagrad as ada
from adadagrad.core.errors import (
    AdadagradError,
    BatchCoupledModule,
    EmptyDataset,
    InvalidArgument,
    OverriddenSampler,
    UnknownName,
    UnsizedDataset,
)
from adadagrad.policies.base import AbstractPolicy
from tests.engine.cases import (
    Asks,
    Sizes,
    make_data,
    make_engine,
    make_model,
    mean_loss,
    patched,
    read_log,
    train,
    weights,
)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(5))


class Endless(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return index


def loader(**options):
    return DataLoader(make_data(), **options)


EMPTY = TensorDataset(torch.zeros(0, 5), torch.zeros(0))
BATCH_SAMPLER = torch.utils.data.BatchSampler(range(50), 5, drop_last=False)


class OwnBatches(torch.utils.data.BatchSampler):
    pass


MODEL, FROZEN = make_model(), make_model().requires_grad_(False)
SPARSE = nn.Sequential(nn.EmbeddingBag(203, 3, sparse=True))


def without_rate(model):
    """An optimizer that chooses its own rate, as Adafactor with relative steps does."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    return optimizer


@dataclass(frozen=True, slots=True)
class Formula(AbstractPolicy):
    """A schedule of somebody's own, with one size."""

    needs: ClassVar[frozenset[str]] = frozenset()
    size: float

    def required_batch_size(self, observation):
        return self.size


# name: (options, error, what the message must say)
BAD = {
    "cap below start": (
        {"max_batch_size": 8, "global_batch_size": 16},
        InvalidArgument,
        "max_batch_size must be >= global_batch_size.*raise max_batch_size or lower global_batch_size",
    ),
    "start beyond budget": (
        {"max_batch_size": 8192, "global_batch_size": 64, "total_samples": 10},
        InvalidArgument,
        "^global_batch_size must not exceed the 10 examples that data set and budget hold, got 64",
    ),
    "start beyond data": (
        {"max_batch_size": 8192, "global_batch_size": 204},
        InvalidArgument,
        "^global_batch_size must not exceed the 203 examples",
    ),
    "multiple beyond data": (
        {"max_batch_size": 8192, "global_batch_size": None, "bounds": ada.Bounds(multiple_of=300)},
        InvalidArgument,
        "^multiple_of must not exceed the 203 examples that data set and budget hold, got 300",
    ),
    "schedule beyond cap": (
        {"policy": ada.StagedBatch("0:64"), "max_batch_size": 32},
        InvalidArgument,
        r"^StagedBatch.* starts at 64 examples, more than max_batch_size=32: raise max_batch_size or start lower",
    ),
    "schedule without a start": (
        {"policy": Formula(math.nan)},
        InvalidArgument,
        r"^policy must start at a finite batch size, but Formula.* asks for nan",
    ),
    "closure": (
        {"optimizer": torch.optim.LBFGS(MODEL.parameters()), "model": MODEL},
        InvalidArgument,
        r"optimizer LBFGS needs a closure .*pass replay=True, or use an optimizer whose step\(\) needs none",
    ),
    "sparse": (
        {"optimizer": torch.optim.SparseAdam(SPARSE.parameters()), "model": SPARSE},
        InvalidArgument,
        r"sparse gradients at 0 \(EmbeddingBag\).*build it with sparse=False",
    ),
    "nothing to train": (
        {"optimizer": torch.optim.SGD(FROZEN.parameters(), lr=0.1), "model": FROZEN},
        InvalidArgument,
        r"model has no parameter that requires grad.*requires_grad_\(True\)",
    ),
    "no rate to schedule": (
        {"optimizer": without_rate(MODEL), "model": MODEL, "lr_schedule": ada.CosineSchedule()},
        InvalidArgument,
        "lr_schedule needs a learning rate to scale, and SGD has none: give the optimizer an lr",
    ),
    "micro 0": ({"micro_batch_size": 0}, InvalidArgument, "micro_batch_size must be >= 1, got 0"),
    "micro -1": ({"micro_batch_size": -1}, InvalidArgument, "micro_batch_size must be >= 1, got -1"),
    "micro float": ({"micro_batch_size": 1.5}, InvalidArgument, "micro_batch_size must be an integer, got 1.5"),
    "micro bool": ({"micro_batch_size": True}, InvalidArgument, "micro_batch_size must be an integer"),
    "global 0": ({"global_batch_size": 0}, InvalidArgument, "global_batch_size must be >= 1, got 0"),
    "global float": ({"global_batch_size": 4.0}, InvalidArgument, "global_batch_size must be an integer"),
    "cap 0": ({"max_batch_size": 0}, InvalidArgument, "max_batch_size must be >= 1"),
    "both budgets": ({"total_samples": 5, "epochs": 1}, InvalidArgument, "either total_samples or epochs"),
    "no budget": ({"total_samples": None}, InvalidArgument, "either total_samples or epochs"),
    "budget 0": ({"total_samples": 0}, InvalidArgument, "total_samples must be >= 1, got 0"),
    "budget float": ({"total_samples": 6e5}, InvalidArgument, "total_samples must be an integer"),
    "epochs 0": ({"epochs": 0}, InvalidArgument, "epochs must be > 0, got 0"),
    "epochs nan": ({"epochs": math.nan}, InvalidArgument, "epochs must be > 0, got nan"),
    "empty": ({"data": EMPTY}, EmptyDataset, "data is empty.*at least one example"),
    "empty subset": ({"data": Subset(make_data(), [])}, EmptyDataset, "data is empty"),
    "iterable": ({"data": Stream()}, UnsizedDataset, "data is an iterable.*pass a map-style data set"),
    "iterable loader": ({"data": DataLoader(Stream())}, UnsizedDataset, "data is an iterable"),
    "unsized": ({"data": Endless()}, UnsizedDataset, "data has no length: give Endless a __len__"),
    "tensors": ({"data": (torch.ones(3), torch.ones(3))}, InvalidArgument, "pass TensorDataset"),
    "no data": ({"data": 5}, InvalidArgument, "data must be a map-style Dataset or a DataLoader"),
    "sampler": (
        {"data": loader(sampler=WeightedRandomSampler(torch.ones(203), 203))},
        OverriddenSampler,
        "sampler of data .WeightedRandomSampler. would be replaced.*shuffle=True",
    ),
    "replacement": (
        {"data": loader(sampler=RandomSampler(make_data(), replacement=True))},
        OverriddenSampler,
        "replacement=True",
    ),
    "batch sampler": (
        {"data": loader(batch_sampler=OwnBatches(range(50), 5, drop_last=False))},
        OverriddenSampler,
        "batch_sampler of data .OwnBatches.",
    ),
    "no batching": ({"data": loader(batch_size=None)}, InvalidArgument, "batch_size=None"),
    "test at b=1": (
        {"global_batch_size": 1},
        InvalidArgument,
        r"global_batch_size must be >= 2 for PerExample.* to measure any noise, got 1",
    ),
    "micro-batches at b=3": (
        {"global_batch_size": 3, "measure": ada.Measure(estimator=ada.MicroBatch())},
        InvalidArgument,
        r"global_batch_size must be >= 4 for MicroBatch",
    ),
    "multiple": (
        {"global_batch_size": 10, "bounds": ada.Bounds(multiple_of=4)},
        InvalidArgument,
        "global_batch_size must be a multiple of multiple_of.*start with 12",
    ),
    "cap below multiple": ({"max_batch_size": 6, "bounds": ada.Bounds(multiple_of=8)}, InvalidArgument, "multiple_of"),
    "policy class": ({"policy": ada.NormTest}, InvalidArgument, r"policy must be an instance.*write NormTest\(\)"),
    "policy word": ({"policy": "norm"}, InvalidArgument, r"policy must be a policy such as NormTest\(\)"),
    "bounds": ({"bounds": 3}, InvalidArgument, r"bounds must be Bounds\(...\) or None, got 3"),
    "measure": ({"measure": "auto"}, InvalidArgument, r"measure must be Measure\(...\) or None, got 'auto'"),
    "schedule": ({"lr_schedule": 3}, InvalidArgument, r"lr_schedule must be a schedule such as CosineSchedule"),
    "schedule class": (
        {"lr_schedule": ada.CosineSchedule},
        InvalidArgument,
        r"lr_schedule must be an instance.*write CosineSchedule\(",
    ),
    "model": ({"model": lambda x: x}, InvalidArgument, "model must be a torch.nn.Module, got function"),
    "wrapped model": (
        {"model": nn.DataParallel(make_model())},
        InvalidArgument,
        "model is wrapped in nn.DataParallel.*use DistributedDataParallel",
    ),
    "optimizer": ({"optimizer": 0.1}, InvalidArgument, "optimizer must be a torch.optim.Optimizer, got float"),
    "optimizer class": ({"optimizer": torch.optim.SGD}, InvalidArgument, "optimizer must be a torch.optim.Optimizer"),
    "on_nonfinite": ({"on_nonfinite": "skp"}, UnknownName, "unknown on_nonfinite 'skp': did you mean skip"),
    "epoch_boundary": ({"epoch_boundary": "cut"}, UnknownName, "unknown epoch_boundary 'cut'.*known: cross, short"),
    "clip 0": ({"max_grad_norm": 0.0}, InvalidArgument, "max_grad_norm must be > 0"),
    "clip nan": ({"max_grad_norm": math.nan}, InvalidArgument, "max_grad_norm must be > 0"),
    "checkpoints nowhere": ({"checkpoint_every": 100}, InvalidArgument, "checkpoint_every needs log_dir"),
    "checkpoint_every 0": ({"checkpoint_every": 0, "log_dir": "x"}, InvalidArgument, "checkpoint_every must be >= 1"),
    "seed": ({"seed": 1.5}, InvalidArgument, "seed must be an integer"),
    "schedule and start": (
        {"policy": ada.StagedBatch("0:8 50:16"), "global_batch_size": 4},
        InvalidArgument,
        r"global_batch_size=4 contradicts StagedBatch.*starts at 8: leave it out",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_by_name_before_any_training(name):
    options, error, message = BAD[name]
    model = options["model"] if isinstance(options.get("model"), nn.Sequential) else make_model()
    before = weights(model)
    options = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), **options}
    with pytest.raises(error, match=f"(?s){message}") as caught:
        make_engine(**options)
    assert isinstance(caught.value, AdadagradError)
    assert isinstance(caught.value, ValueError)
    assert torch.equal(before, weights(model))
    assert not patched(model)


def test_an_estimator_that_is_none_is_refused():
    model = make_model()
    with pytest.raises(InvalidArgument, match=r"estimator must be an instance, .* write PerExample\(\)"):
        make_engine(model, measure=ada.Measure(estimator=ada.PerExample))
    with pytest.raises(InvalidArgument, match=r"estimator must be \"auto\" or an estimator such as .* got 4"):
        make_engine(model, measure=ada.Measure(estimator=4))


def batch_norm_model():
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()


def test_batch_norm_with_an_explicit_per_example_is_refused_and_names_the_module():
    model = batch_norm_model()
    measure = ada.Measure(estimator=ada.PerExample())
    with pytest.raises(BatchCoupledModule, match=r"^1 \(BatchNorm1d\).*use estimator=MicroBatch\(\)"):
        make_engine(model, measure=measure)
    assert not patched(model)


def test_batch_norm_with_auto_is_measured_by_micro_batches():
    model = batch_norm_model()
    engine = make_engine(model, measure=ada.Measure(every=1), policy=ada.NormTest(eta=1.0))
    decisions = train(engine)
    kinds = {d.observation.gradient.kind for d in decisions if d.observation.gradient is not None}
    assert kinds == {"micro_batch"}
    assert len({d.plan.global_batch_size for d in decisions}) > 1


def test_a_model_in_which_examples_mix_by_hand_is_refused_or_measured_by_micro_batches(tmp_path):
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3).double()

        def forward(self, x):
            y = self.layer(x)
            return y - y.mean(0)

    model = Centred()
    before = weights(model)
    with pytest.raises(BatchCoupledModule, match=r"MicroBatch\(\)"):
        train(make_engine(model, measure=ada.Measure(estimator=ada.PerExample(), every=1)))
    assert torch.equal(before, weights(model))
    assert not patched(model)
    engine = make_engine(Centred(), measure=ada.Measure(every=1), policy=ada.NormTest(eta=1.0), log_dir=tmp_path)
    with pytest.warns(UserWarning, match=r"measuring with MicroBatch\(\) from now on"):
        decisions = train(engine)
    assert decisions[0].reason == "estimator replaced"
    assert decisions[1].observation.gradient.kind == "micro_batch"
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    seconds = [0.0, *(json.loads(line)["measure_seconds"] for line in lines[1:])]
    assert all(a < b for a, b in pairwise(seconds[:3]))  # what the first estimator spent is not forgotten
    assert seconds == sorted(seconds)


def test_a_replaced_estimator_that_could_never_measure_is_an_error():
    """Per example, 2 examples are enough; micro-batches need 4: at 2 or 3 nothing would ever be measured again."""

    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3).double()

        def forward(self, x):
            y = self.layer(x)
            return y - y.mean(0)

    model = Centred()
    before = weights(model)
    engine = make_engine(model, global_batch_size=3, measure=ada.Measure(every=1))
    with (
        pytest.warns(UserWarning, match="measuring with MicroBatch"),
        pytest.raises(InvalidArgument, match="global_batch_size must be >= 4 for MicroBatch"),
    ):
        train(engine)
    assert torch.equal(before, weights(model))


def test_an_optimizer_with_foreign_or_missing_parameters_is_refused():
    model, other = make_model(), make_model()
    mixed = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    with pytest.raises(InvalidArgument, match=r"optimizer holds 4 parameters that are not the model's.*one model"):
        make_engine(model, mixed)
    part = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(InvalidArgument, match=r"optimizer does not train 2.weight, 2.bias.*requires_grad_\(False\)"):
        make_engine(model, part)
    model[2].requires_grad_(False)
    assert len(train(make_engine(model, part), steps=2)) == 2


@pytest.mark.parametrize(
    "attach",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 5),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 10),
    ],
)
def test_a_second_owner_of_the_learning_rate_is_refused(attach):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = attach(optimizer)
    with pytest.raises(InvalidArgument, match=r"lr_schedule would be a second owner of the learning rate.*one of the"):
        make_engine(model, optimizer, lr_schedule=ada.CosineSchedule())
    make_engine(model, optimizer)  # alone it may stay
    assert scheduler is not None


def test_a_weighted_ratio_without_second_moments_is_refused():
    model = make_model()
    policy = ada.CoordinateNormTest(eta=1.0, reduction="weighted")
    with pytest.raises(InvalidArgument, match=r'reduction="weighted" needs an optimizer with second moments, got SGD'):
        make_engine(model, torch.optim.SGD(model.parameters(), lr=0.1), policy=policy)


class OwnOptimizer(torch.optim.SGD):
    """An optimizer from elsewhere, of which only its first update shows what state it keeps."""


def test_a_weighted_ratio_is_refused_also_where_the_first_step_is_skipped():
    model = make_model()
    policy = ada.CoordinateNormTest(eta=1.0, reduction="weighted")
    engine = make_engine(model, OwnOptimizer(model.parameters(), lr=0.1), policy=policy)

    def loss(batch):
        return model(batch[0]).square().mean() * (math.nan if engine.steps == 0 else 1.0)

    with pytest.raises(InvalidArgument, match="second moments"):
        train(engine, loss)


def test_leaves_that_cannot_be_sliced_or_joined_are_refused_by_name():
    def ragged(examples):
        return {
            "x": torch.stack([e[0] for e in examples]),
            "tokens": torch.zeros(len(examples), int(examples[0][2]) + 1),
        }

    data = DataLoader(make_data(), shuffle=True, collate_fn=ragged)
    model = make_model()
    engine = make_engine(model, None, data, Sizes(), micro_batch_size=4)
    with pytest.raises(AdadagradError, match=r"batch\['tokens'\]"):
        train(engine, lambda batch: model(batch["x"]).square().mean())
    assert not patched(model)
    scalar = DataLoader(
        make_data(), shuffle=True, collate_fn=lambda e: (torch.stack([x[0] for x in e]), torch.ones(()))
    )
    with pytest.raises(AdadagradError, match=r"batch\[1\]"):
        train(make_engine(model, None, scalar, Sizes(), micro_batch_size=4), lambda b: model(b[0]).square().mean())


def test_a_large_cap_is_the_data_set_and_the_default_start_fits_it():
    engine = make_engine(make_model(), max_batch_size=10**9, total_samples=10**6)
    assert engine.max_batch_size == 203
    engine = make_engine(make_model(), data=make_data(10), global_batch_size=None, total_samples=100)
    assert (engine.global_batch_size, engine.max_batch_size) == (10, 10)
    engine = make_engine(make_model(), policy=Asks(lambda o: 5.0), total_samples=30, global_batch_size=None)
    assert (engine.global_batch_size, engine.max_batch_size) == (30, 30)


@pytest.mark.parametrize(("epochs", "total"), [(1, 203), (2.5, 508), (0.5, 102), (0.0001, 1), (1 / 203, 1), (1.7, 345)])
def test_epochs_are_rounded_to_whole_examples_and_at_least_one(epochs, total):
    engine = make_engine(make_model(), policy=ada.ConstantBatch(1), epochs=epochs)
    assert engine.total_samples == total


def test_a_directory_with_another_runs_log_is_refused_before_any_step(tmp_path):
    train(make_engine(make_model(), policy=Sizes(), log_dir=tmp_path, total_samples=20))
    before = (tmp_path / "run.jsonl").read_bytes()
    model = make_model()
    with pytest.raises(InvalidArgument, match="log_dir holds the log of another run"):
        train(make_engine(model, policy=Sizes(), log_dir=tmp_path, total_samples=20))
    assert (tmp_path / "run.jsonl").read_bytes() == before
    assert torch.equal(weights(model), weights(make_model()))


def test_a_rate_changed_by_hand_under_a_schedule_is_refused():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = make_engine(model, optimizer, policy=Sizes(), lr_schedule=ada.LinearSchedule())

    def change(step):
        step.run(mean_loss(model))
        step.update()
        optimizer.param_groups[0]["lr"] = 0.5

    steps = iter(engine)
    change(next(steps))
    with pytest.raises(InvalidArgument, match="the learning rate was changed between two steps"):
        next(steps)


class NoRate(torch.optim.Optimizer):
    """Steps of a fixed length, with no learning rate."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(0.01 * p.grad.sign())


def test_an_optimizer_without_a_learning_rate_trains_and_is_logged(tmp_path):
    model = make_model()
    decisions = train(make_engine(model, NoRate(model.parameters()), log_dir=tmp_path, total_samples=50))
    assert all(math.isnan(d.lr) for d in decisions)
    assert {line["lr"] for line in read_log(tmp_path) if line["kind"] == "step"} == {"nan"}
    assert not torch.equal(weights(model), weights(make_model()))


def test_a_loss_function_that_returns_more_than_a_pair_is_refused():
    model = make_model()
    with pytest.raises(InvalidArgument, match=r"loss_function must return .*\(loss_sum, weight\), got 3 values"):
        train(make_engine(model), lambda batch: (mean_loss(model)(batch), 1.0, 2.0))
