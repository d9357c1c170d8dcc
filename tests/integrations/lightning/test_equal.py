"""Under Lightning's Trainer a run is the engine's own: trace, weights, statistics, learning rate, log."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from adadagrad import Bounds, ConstantBatch, CosineSchedule, LinearScaling, Measure, MicroBatch, NormTest, StagedBatch
from adadagrad.report.reader import read_run
from tests.integrations.lightning.cases import MICRO, QUIET, N, Net, apart, callback, data, fit, loader, plain, trainer

pytestmark = QUIET


@pytest.mark.parametrize(("kind", "bar"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("optimizer", [torch.optim.Adagrad, torch.optim.AdamW])
def test_the_trace_and_the_weights_are_the_plain_engines(kind, bar, optimizer):
    ours, trace, made, _ = fit(Net(kind=kind, optimizer=optimizer), dataset=data(kind))
    theirs = Net(kind=kind, optimizer=optimizer)
    assert trace.sizes == plain(theirs, data(kind))
    assert len(set(trace.sizes)) > 4
    assert sum(trace.sizes) == 3 * N
    assert made.global_step == len(trace.sizes)
    assert apart(ours, theirs) <= bar


def test_every_example_comes_once_in_every_epoch():
    module, *_ = fit()
    seen = torch.cat(module.seen)
    assert [sorted(epoch.tolist()) for epoch in seen.split(N)] == [list(range(N))] * 3
    assert not torch.equal(seen[:N], seen[N : 2 * N])
    assert [len(rows) for rows in module.seen] == ([MICRO] * (N // MICRO) + [N % MICRO]) * 3


def test_micro_batches_as_units():
    settings = {"measure": Measure(every=1, estimator=MicroBatch()), "policy": NormTest(eta=0.5)}
    _, trace, *_ = fit(adaptive=callback(**settings))
    assert len(set(trace.sizes)) > 2
    assert {d.observation.gradient.kind for d in trace.decisions if d.observation.gradient} == {"micro_batch"}


def test_the_rate_and_the_schedule_are_the_engines():
    settings = {"rate": LinearScaling(), "lr_schedule": CosineSchedule()}
    ours, trace, *_ = fit(adaptive=callback(**settings))
    theirs = Net()
    assert trace.sizes == plain(theirs, **settings)
    assert apart(ours, theirs) <= 1e-6
    assert len({d.lr for d in trace.decisions}) > 5
    without = Net()
    plain(without)
    assert apart(ours, without) > 1e-3


def test_lightning_clips_the_gradient_after_the_statistics():
    ours, trace, *_ = fit(gradient_clip_val=0.05)
    theirs = Net()
    assert trace.sizes == plain(theirs, max_grad_norm=0.05)
    assert apart(ours, theirs) <= 1e-5  # torch adds 1e-6 to the norm
    free, *_ = fit()
    assert apart(ours, free) > 1e-3


def test_lightnings_own_schedulers_step_with_the_optimizer():
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            self.scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler, "interval": "step"}}

    module, trace, *_ = fit(Scheduled())
    assert module.scheduler.last_epoch == len(trace.sizes)
    assert [d.lr for d in trace.decisions[:3]] == [1.0, 0.5, 0.25]


def test_first_batch_bounds_cap_floor_and_seed_reach_the_engine():
    _, trace, *_ = fit(adaptive=callback(global_batch_size=None), accumulate_grad_batches=3)
    assert trace.sizes[0] == 3 * MICRO
    _, trace, *_ = fit(adaptive=callback(max_batch_size=5 * MICRO))
    assert max(trace.sizes) == 5 * MICRO
    _, trace, *_ = fit(adaptive=callback(bounds=Bounds(multiple_of=12), global_batch_size=24))
    assert {d.plan.global_batch_size % 24 for d in trace.decisions} == {0}
    assert len({d.plan.global_batch_size for d in trace.decisions}) > 1
    first, *_ = fit(adaptive=callback(seed=1))
    second, *_ = fit(adaptive=callback(seed=2))
    assert not torch.equal(torch.cat(first.seen), torch.cat(second.seen))


def test_a_schedule_of_batch_sizes_changes_at_any_step():
    policy = StagedBatch({0: 2 * MICRO, 48: 5 * MICRO, 90: 3 * MICRO})
    _, trace, *_ = fit(
        adaptive=callback(policy=policy, global_batch_size=None, measure=None, bounds=None), max_epochs=2
    )
    assert trace.sizes == [16, 16, 16, 40, 13, 40, 24, 24, 13]  # a batch that the epoch cuts decides nothing


def test_the_budget_ends_training_in_the_middle_of_an_epoch():
    module, trace, _, adaptive = fit(adaptive=callback(total_samples=130), max_epochs=-1)
    assert sum(trace.sizes) == 130
    assert len(torch.cat(module.seen)) == 130
    assert adaptive.engine.samples_seen == 130


def test_weights_make_the_mean_over_tokens():
    dataset = data(torch.float64)
    counts = torch.arange(N).remainder(7) + 1

    class Weighted(Net):
        def loss(self, batch):
            weight = counts[batch[2]].double()
            losses = (self.net(batch[0]) - batch[1]).square().mean(1)
            return (losses * weight).sum() / weight.sum()

    def weight(batch):
        return counts[batch[2]].double()

    settings = {"policy": ConstantBatch(), "global_batch_size": 5 * MICRO, "measure": None}
    grads = {}

    class Gradients(torch.optim.SGD):
        def step(self, closure=None):
            loss = None if closure is None else closure()
            grads.setdefault(self.name, []).append(
                torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]])
            )
            return loss

    def run(name, given):
        def optimizer(parameters, lr):
            made = Gradients(parameters, lr=0.0)
            made.name = name
            return made

        module = Weighted(kind=torch.float64, optimizer=optimizer)
        fit(module, callback(weight=given, **settings), dataset=dataset, max_epochs=1)
        return module

    module = run("tokens", weight)
    run("mean of means", None)
    expected = []
    for rows in torch.cat(module.seen).split(5 * MICRO):
        module.zero_grad()
        module.loss([dataset.tensors[0][rows], dataset.tensors[1][rows], rows]).backward()
        expected.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    assert len(expected) == 3
    for ours, control, true in zip(grads["tokens"], grads["mean of means"], expected, strict=True):
        assert float((ours - true).norm() / true.norm()) <= 1e-12
        assert float((control - true).norm() / true.norm()) > 1e-3


def test_the_loss_that_other_callbacks_see_is_the_true_one():
    losses = []

    import lightning.pytorch as pl

    class See(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.append((float(outputs["loss"]), float(module.loss(batch).detach())))

    fit(Net(lr=0.0), more=[See()], max_epochs=1)
    assert len(losses) == 13
    for seen, true in losses:
        assert seen == pytest.approx(true, rel=1e-5)


def test_metrics_reach_lightnings_logger_and_the_engines_own_log(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path / "csv")
    _, trace, *_ = fit(adaptive=callback(log_dir=tmp_path / "run"), logger=logger, log_every_n_steps=1)
    rows = (tmp_path / "csv").rglob("metrics.csv")
    import csv

    lines = [row for row in csv.DictReader(next(rows).open()) if row["adadagrad/global_batch_size"]]
    assert [int(float(row["adadagrad/global_batch_size"])) for row in lines] == trace.sizes
    assert [int(float(row["adadagrad/samples_seen"])) for row in lines][-1] == 3 * N
    assert any(row["adadagrad/noise_scale"] for row in lines)
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "run" / "run.jsonl").open()]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    assert kinds.count("step") == len(trace.sizes)
    assert read_run(tmp_path / "run")


def test_validation_in_the_middle_of_a_step_changes_nothing():
    ours, trace, made, _ = fit(val=True, val_check_interval=5)
    theirs = Net()
    assert trace.sizes == plain(theirs)
    assert apart(ours, theirs) <= 1e-6
    assert "val_loss" in made.callback_metrics


def test_a_module_whose_forward_is_called_is_measured_too():
    class Called(Net):
        def __init__(self):
            super().__init__()
            self.first, self.second = self.net[:3], self.net[3:]
            del self.net

        def forward(self, x):
            return self.second(self.first(x))

        def loss(self, batch):
            return (self(batch[0]) - batch[1]).square().mean()

    ours, trace, *_ = fit(Called())
    theirs = Net()
    assert trace.sizes == plain(theirs)
    assert apart(ours, theirs) <= 1e-6


def test_the_same_trainer_twice_trains_on():
    adaptive = callback()
    module, made = Net(), trainer(adaptive, max_epochs=1)
    made.fit(module, adaptive.loader(loader()))
    made.fit_loop.max_epochs = 2
    made.fit(module, adaptive.loader(loader()))
    assert adaptive.engine.samples_seen >= N


def test_a_batch_norm_is_measured_by_micro_batches():
    class Normed(Net):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    dataset = torch.utils.data.Subset(data(), range(96))
    _, trace, *_ = fit(Normed(), callback(policy=NormTest(eta=0.5)), dataset=dataset)
    assert {d.observation.gradient.kind for d in trace.decisions if d.observation.gradient} == {"micro_batch"}
