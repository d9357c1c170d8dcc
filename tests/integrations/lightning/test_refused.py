"""What the callback cannot do right is refused before the first step, with what to do instead."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from adadagrad import ExtrapolatedSGD, Measure, MicroBatch, NormTest
from adadagrad.core.errors import InvalidArgument, StepError
from adadagrad.integrations.lightning import AdaptiveBatchCallback
from tests.integrations.lightning.cases import QUIET, N, Net, callback, data, fit, loader, trainer

pytestmark = QUIET


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("micro_batch_size", 8, "the loader's batch size"),
        ("max_grad_norm", 1.0, "gradient_clip_val"),
        ("epochs", 2, "max_epochs"),
        ("checkpoint_every", 100, "ModelCheckpoint"),
        ("epoch_boundary", "cross", "short"),
        ("replay", True, "out of reach"),
        ("parallel", None, "strategy"),
        ("etaa", 0.1, "etaa is no argument"),
    ],
)
def test_settings_that_are_the_trainers(name, value, match):
    with pytest.raises(InvalidArgument, match=match):
        AdaptiveBatchCallback(NormTest(eta=0.5), **{name: value})


class Stream(IterableDataset):
    def __iter__(self):
        return iter(data())


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ([1, 2], "must be a torch DataLoader"),
        (DataLoader(Stream(), batch_size=8), "no IterableDataset"),
        (DataLoader(data(), batch_sampler=BatchSampler(SequentialSampler(data()), 8, False)), "batch_size"),
        (DataLoader(data(), batch_size=None), "batch_size"),
    ],
)
def test_loaders(given, match):
    with pytest.raises(InvalidArgument, match=match):
        callback().loader(given)


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Two(Net):
    def configure_optimizers(self):
        return [torch.optim.SGD([p], lr=0.1) for p in list(self.parameters())[:2]], []


class Silent(Net):
    def training_step(self, batch, batch_idx):
        return None


class Normed(Net):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


@pytest.mark.parametrize(
    ("module", "settings", "match"),
    [
        (Manual, {}, "automatic_optimization=False"),
        (Two, {}, "Manual|one optimizer|multiple optimizers"),
        (Net, {"limit_train_batches": 3}, "Subset"),
        (Net, {"fast_dev_run": True}, "Subset"),
        (Net, {"overfit_batches": 2}, "Subset"),
        (Net, {"reload_dataloaders_every_n_epochs": 1}, "restart the stream"),
        (Net, {"max_epochs": -1}, "total_samples is needed"),
        (Net, {"more": [GradientAccumulationScheduler({0: 2})]}, "take it out of callbacks"),
        (Silent, {}, "training_step must return a loss"),
        (Normed, {"more": [StochasticWeightAveraging(0.01)]}, "an epoch without steps"),
        (Net, {"min_steps": 9, "adaptive": callback(total_samples=N)}, "go on after total_samples"),
        (Net, {"min_epochs": 2, "adaptive": callback(total_samples=2 * N - 1)}, "go on after total_samples"),
    ],
)
def test_trainers(module, settings, match):
    with pytest.raises((InvalidArgument, RuntimeError), match=match):
        fit(module(), **settings)


def test_what_is_near_to_the_refused_is_not():
    fit(Net(), more=[StochasticWeightAveraging(0.01)], max_epochs=1)
    *_, made, adaptive = fit(Net(), callback(total_samples=2 * N), min_epochs=2)
    assert (made.current_epoch, adaptive.engine.samples_seen) == (2, 2 * N)


def test_a_loader_that_is_not_the_callbacks():
    with pytest.raises(InvalidArgument, match=r"adaptive\.loader\(loader\)"):
        trainer(callback()).fit(Net(), loader())
    adaptive = callback()
    adaptive.loader(loader())
    with pytest.raises(InvalidArgument, match=r"adaptive\.loader\(loader\)"):
        trainer(adaptive).fit(Net(), loader())
    with pytest.raises(StepError, match="in training only"):
        next(iter(adaptive.loader(loader())))


def test_an_optimizer_that_moves_the_parameters_during_a_step():
    with pytest.raises(InvalidArgument, match="ExtrapolatedSGD evaluates gradients away"):
        fit(Net(optimizer=ExtrapolatedSGD))


def test_a_first_batch_that_is_no_multiple_of_the_micro_batch():
    with pytest.raises(InvalidArgument, match="global_batch_size must be a multiple of multiple_of"):
        fit(adaptive=callback(global_batch_size=20))


class Parts(Net):
    """`training_step` calls two children, none of which holds all parameters."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 1)
        del self.net

    def loss(self, batch):
        return (self.second(self.first(batch[0])) - batch[1]).square().mean()


def test_a_module_that_is_not_called_cannot_be_measured_by_examples():
    with pytest.raises(InvalidArgument, match=r"did not call Parts\(\.\.\.\)"):
        fit(Parts())
    _, trace, *_ = fit(Parts(), callback(measure=Measure(every=1, estimator=MicroBatch()), policy=NormTest(eta=0.5)))
    assert len(set(trace.sizes)) > 1


def test_the_module_that_is_named_is_measured():
    class Deep(Net):
        def __init__(self):
            super().__init__()
            self.box = nn.ModuleDict({"net": self.net})
            self.other = nn.ModuleDict({"net": self.net})

    with pytest.raises(InvalidArgument, match=r"did not call Deep"):
        fit(Deep())
    _, trace, *_ = fit(Deep(), callback(module="box.net"))
    assert len(set(trace.sizes)) > 1
    with pytest.raises(InvalidArgument, match="is not in the LightningModule"):
        fit(adaptive=callback(module="nett"))
    with pytest.raises(InvalidArgument, match="must hold all trainable parameters"):
        fit(adaptive=callback(module=r"net.0"))


def test_an_error_in_the_users_step_leaves_no_context_open():
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise ValueError("the user's own")
            return super().training_step(batch, batch_idx)

    module = Fails()
    with pytest.raises(ValueError, match="the user's own"):
        fit(module)
    assert "forward" not in vars(module.net)
    fit(Net())


def test_a_gradient_that_is_not_finite_is_left_out():
    class Breaks(Net):
        def loss(self, batch):
            loss = super().loss(batch)
            return loss * float("nan") if 50 in batch[2] else loss

    module, trace, made, adaptive = fit(Breaks())
    assert [d.reason for d in trace.decisions].count("skipped: non-finite") == 3
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert adaptive.engine.samples_seen < 303
    assert made.global_step == len(trace.sizes)
    with pytest.raises(Exception, match="not both finite"):
        fit(Breaks(), callback(on_nonfinite="stop"))


def test_without_lightning_the_extra_is_named():
    import subprocess
    import sys

    program = (
        "import sys; sys.modules['lightning'] = None\n"
        "import adadagrad\n"
        "from adadagrad.core.errors import MissingExtra\n"
        "try:\n    import adadagrad.integrations.lightning\n"
        "except MissingExtra as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "adadagrad[lightning]" in done.stdout


def test_pl_is_what_users_import():
    assert issubclass(AdaptiveBatchCallback, pl.Callback)
