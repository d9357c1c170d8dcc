"""`AdaptiveBatchTrainer` in one process: its steps, its data, its counts, its logs, beside the raw Trainer's faults."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("transformers")

from transformers import EarlyStoppingCallback, Trainer

from adadagrad import AdaptiveBatch, Bounds, ConstantBatch, Measure, NormTest, StagedBatch
from adadagrad.integrations.transformers import AdaptiveBatchTrainer
from adadagrad.statistics import PerExample
from tests.integrations.transformers_cases import Linear, OfGradientOne, Watching, arguments, rows, sizes

STAGES = StagedBatch({0: 16, 48: 40, 200: 24})


def train(folder, model=None, data=None, policy=STAGES, callbacks=(), our=None, **changed):
    """Return a trainer of ours that has trained."""
    model = Linear() if model is None else model
    data = rows(100) if data is None else data
    trainer = AdaptiveBatchTrainer(
        model, arguments(folder, **changed), train_dataset=data, policy=policy, callbacks=list(callbacks), **(our or {})
    )
    trainer.train()
    return trainer


class TestRaw:
    """What Trainer itself does when its accumulation changes: should this fail, Trainer has been mended."""

    def test_a_change_that_is_not_aligned_cuts_a_window_and_leaves_steps_out(self, tmp_path):
        watching = Watching({3: 4})
        args = arguments(tmp_path, gradient_accumulation_steps=2, num_train_epochs=1)
        Trainer(Linear(), args, train_dataset=rows(400), callbacks=[watching]).train()
        assert watching.micro_batches[:6] == [2, 2, 2, 2, 4, 4]
        assert watching.planned == 25
        assert len(watching.micro_batches) == 15

    def test_the_schedule_of_its_learning_rate_never_ends(self, tmp_path):
        watching = Watching({4: 4})
        args = arguments(tmp_path, gradient_accumulation_steps=2, num_train_epochs=1, lr_scheduler_type="linear")
        trainer = Trainer(Linear(), args, train_dataset=rows(400), callbacks=[watching])
        trainer.train()
        assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(1e-2 * (25 - 15) / 25)


class TestSteps:
    def test_every_step_has_the_gradient_of_its_examples_the_last_partial_one_too(self, tmp_path):
        watching = Watching()
        trainer = train(tmp_path, OfGradientOne(), callbacks=[watching], num_train_epochs=3)
        assert sizes(trainer) == [16, 16, 16, 40, 40, 40, 40, 24, 24, 24, 20]
        assert watching.gradients == pytest.approx([1.0] * 11, abs=1e-6)

    def test_every_example_comes_once_in_every_epoch(self, tmp_path):
        model = Linear()
        train(tmp_path, model, num_train_epochs=3)
        assert len(model.seen) == 300
        for epoch in range(3):
            assert sorted(model.seen[epoch * 100 : (epoch + 1) * 100]) == list(range(100))
        assert max(model.sizes) == 8

    @pytest.mark.parametrize("workers", [0, 2])
    def test_workers_change_nothing(self, tmp_path, workers):
        model = Linear()
        train(tmp_path, model, num_train_epochs=1, dataloader_num_workers=workers)
        reference = Linear()
        train(tmp_path, reference, num_train_epochs=1)
        assert model.seen == reference.seen
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), reference.parameters(), strict=True))

    def test_it_equals_the_engine_alone(self, tmp_path):
        policy, measure = NormTest(eta=0.5), Measure(every=2, estimator=PerExample())
        model = Linear()
        trainer = train(
            tmp_path,
            model,
            policy=policy,
            our={"measure": measure, "max_batch_size": 64},
            num_train_epochs=4,
            gradient_accumulation_steps=2,
            lr_scheduler_type="cosine",
            optim="adagrad",
        )
        theirs = Linear()
        engine = AdaptiveBatch(
            theirs,
            torch.optim.Adagrad(theirs.parameters(), lr=1e-2),
            rows(100),
            policy,
            measure=measure,
            global_batch_size=16,
            micro_batch_size=8,
            max_batch_size=64,
            epochs=4,
            lr_schedule=lambda seen, total: 0.5 * (1 + math.cos(math.pi * seen / total)),
            seed=0,
        )
        trace = []
        for step in engine:
            step.run(lambda batch: theirs(**batch)["loss"])
            trace.append(step.update().observation.global_batch_size)
        assert sizes(trainer) == trace
        assert len(set(trace)) > 2
        for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)

    def test_a_batch_that_never_changes_trains_as_trainer_does(self, tmp_path):
        settings = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential"}
        if "train_sampling_strategy" not in vars(arguments(tmp_path)):
            pytest.skip("this version of transformers has no order to compare in")
        settings |= {"max_grad_norm": 0.5, "lr_scheduler_type": "linear", "warmup_steps": 3, "optim": "adamw_torch"}
        ours, theirs = Linear(), Linear()
        trainer = train(tmp_path, ours, rows(96), ConstantBatch(), **settings)
        raw = Trainer(theirs, arguments(tmp_path, **settings), train_dataset=rows(96))
        raw.train()
        assert ours.seen == theirs.seen
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
        for name in ("loss", "learning_rate", "grad_norm", "epoch"):
            mine = [line[name] for line in trainer.state.log_history if "loss" in line]
            assert mine == pytest.approx([line[name] for line in raw.state.log_history if "loss" in line], rel=1e-5)

    def test_a_step_that_is_not_finite_is_left_out(self, tmp_path):
        data = rows(64)
        data[7]["y"] = torch.tensor([math.nan])
        model = Linear()
        trainer = train(tmp_path, model, data, ConstantBatch(), gradient_accumulation_steps=2, num_train_epochs=1)
        assert all(torch.isfinite(p).all() for p in model.parameters())
        assert trainer.state.log_history[-1]["adadagrad/samples_seen"] == 64  # the budget counts updates
        assert len(model.seen) == 80

    def test_the_user_can_have_it_stopped(self, tmp_path):
        from adadagrad.core.errors import NonFiniteGradient

        data = rows(64)
        data[7]["y"] = torch.tensor([math.nan])
        with pytest.raises(NonFiniteGradient, match="not both finite"):
            train(tmp_path, data=data, policy=ConstantBatch(), our={"on_nonfinite": "stop"}, num_train_epochs=1)


class TestCounts:
    @pytest.mark.parametrize(
        ("changed", "our", "total"),
        [
            ({"num_train_epochs": 2.5}, {}, 250),
            ({"max_steps": 7, "gradient_accumulation_steps": 2}, {}, 7 * 16),
            ({"max_steps": 7}, {"total_samples": 130}, 130),
        ],
    )
    def test_steps_and_epochs_are_a_budget_of_examples(self, tmp_path, changed, our, total):
        policy = StagedBatch({0: 16, 48: 40}) if "gradient_accumulation_steps" in changed else ConstantBatch()
        model = Linear()
        trainer = train(tmp_path, model, policy=policy, our=our, **changed)
        assert len(model.seen) == total
        assert trainer.state.global_step == trainer.state.max_steps == len(sizes(trainer))
        assert trainer.state.epoch == total / 100

    def test_the_epoch_and_what_hangs_on_it_follow_the_examples(self, tmp_path):
        data = rows(100)
        trainer = AdaptiveBatchTrainer(
            Linear(),
            arguments(tmp_path, num_train_epochs=3, eval_strategy="epoch"),
            train_dataset=data,
            eval_dataset=data[:10],
            policy=STAGES,
        )
        trainer.train()
        epochs = [line["epoch"] for line in trainer.state.log_history if "eval_loss" in line]
        assert epochs == [1.28, 2.08, 3.0]

    def test_a_batch_can_end_with_its_epoch(self, tmp_path):
        trainer = train(tmp_path, our={"epoch_boundary": "short"}, num_train_epochs=2)
        assert sizes(trainer) == [16, 16, 16, 40, 12, 40, 40, 20]

    def test_the_estimate_of_the_steps_to_come_follows_the_batch(self, tmp_path):
        seen = []

        class Estimate(Watching):
            def on_step_end(self, args, state, control, **others):
                seen.append(state.max_steps)

        train(tmp_path, callbacks=[Estimate()], num_train_epochs=3)
        assert seen == [19, 19, 10, 10, 10, 10, 11, 11, 11, 11, 11]

    def test_the_bar_shows_the_estimate(self, tmp_path, capsys):
        from transformers import ProgressCallback

        class Bar(ProgressCallback):
            totals: list[int] = []  # noqa: RUF012

            def on_step_end(self, args, state, control, **others):
                super().on_step_end(args, state, control, **others)
                self.totals.append(self.training_bar.total)

        train(tmp_path, callbacks=[Bar()], num_train_epochs=3)
        assert Bar.totals == [19, 19, 10, 10, 10, 10, 11, 11, 11, 11, 11]
        assert "11/11" in capsys.readouterr().err

    def test_early_stopping_and_the_best_model_work(self, tmp_path):
        data = rows(100)
        args = arguments(
            tmp_path,
            num_train_epochs=20,
            learning_rate=1e-9,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="fixed",
        )
        trainer = AdaptiveBatchTrainer(
            Linear(),
            args,
            train_dataset=data,
            eval_dataset=data[:20],
            policy=STAGES,
            compute_metrics=lambda found: {"fixed": 1.0},
            callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        )
        trainer.train()
        assert trainer.state.global_step == 6
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
        assert trainer.evaluate()["eval_fixed"] == 1.0
        assert trainer.predict(data[:20]).metrics["test_fixed"] == 1.0
        assert "adadagrad/samples_seen" not in trainer.evaluate()

    def test_a_second_run_begins_anew_at_the_first_rate(self, tmp_path):
        model = Linear()
        trainer = train(tmp_path, model, num_train_epochs=1, lr_scheduler_type="linear")
        first = [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]
        trainer.train()
        assert [line["learning_rate"] for line in trainer.state.log_history if "loss" in line] == first
        assert len(model.seen) == 200


class TestRates:
    @pytest.mark.parametrize(
        ("schedule", "further"),
        [
            ("linear", {}),
            ("cosine", {}),
            ("cosine_with_restarts", {"num_cycles": 2}),
            ("polynomial", {"power": 2.0}),
            ("inverse_sqrt", {}),
            ("warmup_stable_decay", {"num_decay_steps": 6}),
            ("constant_with_warmup", {}),
        ],
    )
    def test_the_rate_is_the_same_after_as_many_examples_whatever_the_batches_were(self, tmp_path, schedule, further):
        changed = {
            "num_train_epochs": 4,
            "lr_scheduler_type": schedule,
            "lr_scheduler_kwargs": further,
            "warmup_steps": 4,
        }
        found = []
        for policy in (ConstantBatch(), StagedBatch({0: 8, 64: 16, 256: 32})):
            trainer = train(tmp_path, policy=policy, **changed)
            lines = [line for line in trainer.state.log_history if "loss" in line]
            before = [0, *(line["adadagrad/samples_seen"] for line in lines)]
            found.append(dict(zip(before, (line["learning_rate"] for line in lines), strict=False)))
        common = found[0].keys() & found[1].keys()
        assert len(common) == len(found[1]) > 15
        assert max(abs(found[0][seen] - found[1][seen]) for seen in common) == 0.0
        assert len({found[1][seen] for seen in common}) > 3

    def test_a_rule_may_own_the_rate_too(self, tmp_path):
        from adadagrad import SquareRootScaling

        trainer = train(tmp_path, our={"rate": SquareRootScaling()}, num_train_epochs=2)
        rates = [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]
        assert rates[0] == 1e-2
        assert rates[3] == pytest.approx(1e-2 * math.sqrt(40 / 16))

    def test_a_rule_that_counts_progress_ends_the_run(self, tmp_path):
        from adadagrad import AdaScale

        model = Linear()
        measure = Measure(every=1, estimator=PerExample())
        our = {"rate": AdaScale(), "measure": measure}
        train(tmp_path, model, policy=NormTest(eta=0.2), our=our, max_steps=40)
        assert len(model.seen) > 40 * 8


class TestLogs:
    def test_sizes_and_noise_join_trainers_own_log(self, tmp_path):
        measure = Measure(every=2, estimator=PerExample())
        trainer = train(
            tmp_path,
            policy=NormTest(eta=0.5),
            our={"measure": measure, "log_dir": tmp_path / "run"},
            num_train_epochs=2,
            report_to="tensorboard",
        )
        first, second, third = trainer.state.log_history[:3]
        assert first["adadagrad/global_batch_size"] == first["adadagrad/samples_seen"] == 8
        assert first["adadagrad/noise_scale"] == second["adadagrad/noise_scale"] != third["adadagrad/noise_scale"]
        assert {
            "adadagrad/next_global_batch_size",
            "adadagrad/grad_norm_sq",
            "adadagrad/variance_trace",
        } <= second.keys()
        assert trainer.state.log_history[-1]["train_samples_per_second"] == pytest.approx(
            200 / trainer.state.log_history[-1]["train_runtime"], rel=1e-3
        )
        lines = [json.loads(line) for line in (tmp_path / "run" / "run.jsonl").read_text().splitlines()]
        assert [line["kind"] for line in lines if line["kind"] != "step"] == ["start", "end"]
        assert [line["global_batch_size"] for line in lines if line["kind"] == "step"] == sizes(trainer)

    def test_trackers_get_them(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
        train(tmp_path, num_train_epochs=1, report_to="tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "board")).Reload()
        assert [event.value for event in events.Scalars("train/adadagrad/global_batch_size")] == [16, 16, 16, 40, 12]
        assert [event.value for event in events.Scalars("train/adadagrad/samples_seen")][:5] == [16, 32, 48, 88, 100]

    def test_evaluations_join_the_engines_log(self, tmp_path):
        data = rows(64)
        trainer = AdaptiveBatchTrainer(
            Linear(),
            arguments(tmp_path, num_train_epochs=1, eval_strategy="steps", eval_steps=4),
            train_dataset=data,
            eval_dataset=data[:8],
            policy=ConstantBatch(),
            log_dir=tmp_path / "run",
        )
        trainer.train()
        lines = [json.loads(line) for line in (tmp_path / "run" / "run.jsonl").read_text().splitlines()]
        kept = [line for line in lines if line["kind"] == "log"]
        assert [line["samples_seen"] for line in kept] == [32, 64]
        evaluated = [line for line in trainer.state.log_history if "eval_loss" in line]
        assert kept[0]["metrics"]["eval_loss"] == evaluated[0]["eval_loss"]
        assert evaluated[0]["adadagrad/samples_seen"] == 32

    def test_the_loss_is_the_mean_over_the_step(self, tmp_path):
        data = rows(24)
        model = Linear()
        with torch.no_grad():
            expected = sum(float(model(**{k: v[None] for k, v in row.items()})["loss"]) for row in data) / 24
        trainer = train(tmp_path, model, data, ConstantBatch(), gradient_accumulation_steps=3, num_train_epochs=1)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_bounds_and_limits_reach_the_engine(tmp_path):
    policy = NormTest(eta=1e-3)
    measure = Measure(every=1, estimator=PerExample())
    our = {"measure": measure, "bounds": Bounds(max_growth=2.0, multiple_of=8)}
    assert sizes(train(tmp_path, policy=policy, our=our, num_train_epochs=2))[:4] == [8, 16, 32, 64]
    our |= {"max_batch_size": 32}
    assert max(sizes(train(tmp_path, policy=policy, our=our, num_train_epochs=2))) == 32
    falling = StagedBatch({0: 32, 32: 4})
    assert min(sizes(train(tmp_path, policy=falling, our={"min_batch_size": 20}, num_train_epochs=2))[:3]) == 20
    assert min(sizes(train(tmp_path, policy=falling, num_train_epochs=2))[:3]) == 4
