"""Save after step k and resume, for every k: bitwise the uninterrupted run."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import adadagrad as ada
from adadagrad.checkpoint import save_checkpoint
from adadagrad.core.errors import CorruptCheckpoint, InvalidArgument, NonFiniteGradient, StepError
from tests.batching.cases import many_workers
from tests.engine.cases import WHOLE, Asks, Sizes, make_data, make_engine, make_model, mean_loss, read_log, weights

STEPS = 30


class Scaled(nn.Module):
    """A parameter used directly in a composite forward, so that no rule counts it."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = nn.Linear(5, 3), nn.Parameter(torch.full((3,), 0.5))

    def forward(self, x):
        return torch.tanh(self.inner(x)) * self.scale


def scaled_model():
    torch.manual_seed(3)
    return Scaled().double()


def wide_model():
    """Wide enough for the default budget to measure several of 30 small steps."""
    torch.manual_seed(3)
    layers = [nn.Linear(5, 256), nn.Tanh(), nn.Linear(256, 256), nn.Dropout(0.2), nn.Tanh(), nn.Linear(256, 3)]
    return nn.Sequential(*layers).double()


def batch_norm_model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 3)).double()


def scaled_dropout_model():
    torch.manual_seed(3)
    return nn.Sequential(Scaled(), nn.Dropout(0.2), nn.Linear(3, 3)).double()


def adagrad(model):
    return torch.optim.Adagrad(model.parameters(), lr=0.1)


def growth(observation):
    """Grow and shrink with the statistics themselves, so that the trace follows every bit of them."""
    g = observation.gradient
    return 4 + 1000 * g.variance_trace % 20


CASES = {
    "defaults": (
        wide_model,
        adagrad,
        lambda: ada.NormTest(eta=0.3),
        {
            "bounds": ada.Bounds(max_growth=1.5),
            "measure": ada.Measure(max_overhead=0.5),
        },  # often enough for a short run
    ),
    "every step": (
        lambda: make_model(0.3),
        adagrad,
        lambda: Asks(growth),
        {"measure": ada.Measure(every=1), "micro_batch_size": 3},
    ),
    "budget": (
        lambda: make_model(0.3),
        adagrad,
        lambda: Asks(growth),
        {"measure": ada.Measure(max_overhead=1.0, max_examples=5)},
    ),
    "paper": (
        lambda: make_model(0.3),
        lambda model: ada.AdaGradNorm(model.parameters(), lr=0.5),
        lambda: ada.NormTest(eta=1.2),
        {"measure": ada.Measure(every=1, max_examples=None), "bounds": ada.Bounds.paper()},
    ),
    "augmented": (
        lambda: make_model(0.3),
        lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
        lambda: ada.AugmentedInnerProductTest(theta=1.0, nu=1.2),
        {"measure": ada.Measure(every=2), "epoch_boundary": "short"},
    ),
    "weighted ratio": (
        lambda: make_model(0.3),
        adagrad,
        lambda: ada.CoordinateNormTest(eta=1.2, reduction="weighted"),
        {"measure": ada.Measure(every=1)},
    ),
    "fallback": (scaled_model, adagrad, lambda: Asks(growth), {"measure": ada.Measure(every=1)}),
    "replaced estimator": (scaled_dropout_model, adagrad, lambda: Asks(growth), {"measure": ada.Measure(every=1)}),
    "batch norm": (batch_norm_model, adagrad, lambda: Asks(growth), {"measure": ada.Measure(max_overhead=1.0)}),
    "schedule": (
        lambda: make_model(0.3),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        lambda: Sizes(largest=25),
        {"lr_schedule": ada.CosineSchedule(warmup_samples=50), "max_grad_norm": 0.5},
    ),
}


def build(name, log_dir, seed_everything=True, **more):
    model, optimizer, policy, options = CASES[name]
    model = model()
    if seed_everything:
        torch.manual_seed(11)
    options = {
        "global_batch_size": {"schedule": None, "defaults": 16}.get(name, 4),
        "log_dir": log_dir,
        "seed": 5,
        **options,
        **more,
    }
    options.setdefault("total_samples", 2000)
    return make_engine(model, optimizer(model), make_data(61), policy(), **options)


def go(engine, until, before=None):
    """Train until a step; return (loss, size, requested, lr) of each. `before` is called after every update."""
    trace = []
    if engine.steps >= until:
        return trace
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(no rule counts this gradient|measuring with MicroBatch).*")
        for step in engine:
            step.run(mean_loss(engine.model))
            d = step.update()
            trace.append((d.observation.loss, d.observation.global_batch_size, d.requested, d.lr, d.reason))
            if before is not None:
                before()
            if engine.steps == until:
                break
    return trace


def state_of(engine):
    """Everything that a resumed run must have bitwise, as one tensor and one list."""
    state = engine.optimizer.state_dict()
    tensors = [t for entry in state["state"].values() for t in entry.values() if isinstance(t, torch.Tensor)]
    buffers = [b.double().flatten() for b in engine.model.buffers()]
    return torch.cat([weights(engine.model), *[t.double().flatten() for t in tensors], *buffers, torch.rand(3)])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_resuming_after_any_step_is_bitwise_the_uninterrupted_run(name, tmp_path):
    whole = build(name, tmp_path / "whole")
    path = tmp_path / "states"
    trace = go(whole, STEPS, lambda: whole.save(path / f"{whole.steps}.pt"))
    final = state_of(whole)
    log = read_log(tmp_path / "whole")
    assert len(trace) == STEPS
    assert len({size for _, size, *_ in trace}) > 2
    every_k = WHOLE or name in ("defaults", "every step", "fallback")
    for k in range(1, STEPS) if every_k else range(1, STEPS, 6):
        resumed = build(name, None)
        resumed.load(path / f"{k}.pt")
        assert go(resumed, STEPS) == trace[k:]
        assert torch.equal(state_of(resumed), final)
    for k in range(1, STEPS) if WHOLE else (1, 7, 22):
        directory = tmp_path / str(k)
        first = build(name, directory)
        head = go(first, k)
        first.save(directory / "checkpoint.pt")
        torch.manual_seed(99)  # what else a new process would have done with its generators
        second = build(name, directory, seed_everything=False)
        second.load(directory / "checkpoint.pt")
        tail = go(second, STEPS)
        assert head + tail == trace
        assert torch.equal(state_of(second), final)
        assert read_log(directory) == log


def test_resuming_twice_in_a_row_and_at_once_is_the_uninterrupted_run(tmp_path):
    whole = build("defaults", tmp_path / "whole")
    trace = go(whole, STEPS)
    got = []
    for until in (4, 4, 5, 17, 18, STEPS):
        engine = build("defaults", tmp_path / "run", seed_everything=not got)
        if got:
            engine.load(tmp_path / "saved.pt")
        got += go(engine, until)
        engine.save(tmp_path / "saved.pt")
    assert got == trace
    assert torch.equal(weights(engine.model), weights(whole.model))
    assert read_log(tmp_path / "run") == read_log(tmp_path / "whole")


def test_what_was_logged_after_the_checkpoint_is_cut_off(tmp_path):
    whole = build("every step", tmp_path / "whole")
    go(whole, STEPS)
    first = build("every step", tmp_path / "run")
    go(first, 10)
    first.save(tmp_path / "saved.pt")
    first.log({"val/accuracy": 0.5})
    go(first, 20)
    second = build("every step", tmp_path / "run")
    second.load(tmp_path / "saved.pt")
    go(second, STEPS)
    assert read_log(tmp_path / "run") == read_log(tmp_path / "whole")


def test_a_finished_run_can_be_loaded_and_has_nothing_left(tmp_path):
    engine = build("defaults", tmp_path, total_samples=300)
    assert sum(size for _, size, *_ in go(engine, 10**9)) == 300
    engine.save(tmp_path / "end.pt")
    again = build("defaults", tmp_path, total_samples=300)
    again.load(tmp_path / "end.pt")
    assert go(again, 10**9) == []
    assert again.samples_seen == 300
    assert [line["kind"] for line in read_log(tmp_path)][-1] == "end"


def test_a_state_saved_before_the_first_step_resumes_as_a_fresh_run(tmp_path):
    whole = build("every step", tmp_path / "whole")
    whole.save(tmp_path / "zero.pt")
    trace = go(whole, 12)
    again = build("every step", tmp_path / "again", seed_everything=False)
    again.load(tmp_path / "zero.pt")
    assert go(again, 12) == trace
    assert read_log(tmp_path / "again") == read_log(tmp_path / "whole")


def test_the_state_is_plain_values_that_weights_only_reads(tmp_path):
    engine = build("every step", None)
    go(engine, 3)
    engine.save(tmp_path / "state.pt")
    content = torch.load(tmp_path / "state.pt", weights_only=True)
    allowed = (int, float, bool, str, torch.Tensor, type(None))

    def walk(value):
        if isinstance(value, dict):
            assert all(isinstance(key, str | int) for key in value)
            return all(walk(item) for item in value.values())
        if isinstance(value, list | tuple):
            return all(walk(item) for item in value)
        return isinstance(value, allowed)

    assert walk(content)
    other = build("every step", None)
    other.load_state_dict(content["engine"])
    assert other.steps == 3


def test_the_state_is_refused_while_a_step_is_under_way():
    engine = build("every step", None)
    for step in engine:
        with pytest.raises(StepError, match=r"save after step.update"):
            engine.state_dict()
        for batch in step:
            step.backward(mean_loss(engine.model)(batch))
            with pytest.raises(StepError, match="in progress"):
                engine.save("never")
        with pytest.raises(StepError, match="in progress"):
            engine.state_dict()
        step.update()
        assert engine.state_dict()["steps"] == engine.steps
        if engine.steps == 3:
            break
    assert engine.state_dict()["steps"] == 3


@pytest.mark.parametrize("every", [1, 50, 137])
def test_checkpoint_every_saves_when_so_many_samples_have_been_seen(every, tmp_path):
    engine = build("every step", tmp_path, total_samples=400, checkpoint_every=every)
    folder, saved = tmp_path / "checkpoints", []

    def look():
        if folder.exists():
            newest = max(folder.iterdir())
            seen = torch.load(newest, weights_only=True)["engine"]["samples_seen"]
            if not saved or saved[-1] != seen:
                saved.append(seen)

    sizes = [size for _, size, *_ in go(engine, 10**9, look)]
    expected, last, seen = [], 0, 0
    for size in sizes:
        seen += size
        if seen - last >= every:
            last = seen
            expected.append(seen)
    assert saved == expected
    again = build("every step", tmp_path, total_samples=400)
    assert again.resume()
    assert again.samples_seen == saved[-1]
    assert [entry.name for entry in tmp_path.iterdir() if "tmp" in entry.name] == []


@many_workers[0]
@many_workers[1]
@pytest.mark.parametrize("workers", [2])
def test_resuming_with_loader_workers_gives_the_same_run(workers, tmp_path):
    def engine_on(count):
        model = make_model(0.3)
        torch.manual_seed(11)
        data = DataLoader(make_data(61), shuffle=True, num_workers=count)
        policy, measure = Asks(growth), ada.Measure(every=1)
        return make_engine(model, adagrad(model), data, policy, measure=measure, total_samples=500, seed=5)

    whole = engine_on(workers)
    trace = go(whole, 20)
    first = engine_on(workers)
    head = go(first, 9)
    first.save(tmp_path / "saved.pt")
    second = engine_on(workers)
    second.load(tmp_path / "saved.pt")
    assert head + go(second, 20) == trace
    assert torch.equal(weights(second.model), weights(whole.model))


def test_another_micro_batch_size_resumes_the_same_samples_and_sizes_to_rounding(tmp_path):
    def engine_of(micro_batch_size):
        model = make_model()
        options = {"measure": ada.Measure(every=1, max_examples=None), "bounds": ada.Bounds(max_growth=1.2)}
        return make_engine(
            model, adagrad(model), make_data(61), micro_batch_size=micro_batch_size, total_samples=500, **options
        )

    whole = engine_of(16)
    trace = go(whole, 20)
    first = engine_of(16)
    go(first, 8)
    first.save(tmp_path / "saved.pt")
    second = engine_of(3)
    second.load(tmp_path / "saved.pt")
    tail = go(second, 20)
    assert [size for _, size, *_ in tail] == [size for _, size, *_ in trace[8:]]
    assert max(abs(a[0] - b[0]) for a, b in zip(tail, trace[8:], strict=True)) < 1e-12
    assert (weights(second.model) - weights(whole.model)).norm() < 1e-12


@pytest.mark.parametrize(("change", "word"), [({"seed": 6}, "seed"), ({"data": make_data(60)}, "dataset_size")])
def test_a_state_of_another_stream_is_refused_by_name(change, word, tmp_path):
    engine = build("defaults", None)
    go(engine, 2)
    engine.save(tmp_path / "saved.pt")
    model = make_model(0.3)
    options = {"data": make_data(61), "seed": 5, **change}
    other = make_engine(model, adagrad(model), **options)
    before = weights(model)
    with pytest.raises(InvalidArgument, match=word):
        other.load(tmp_path / "saved.pt")
    assert torch.equal(before, weights(model))


def test_a_checkpoint_of_something_else_is_refused_by_name(tmp_path):
    save_checkpoint(tmp_path / "other.pt", {"weights": torch.ones(3)})
    with pytest.raises(CorruptCheckpoint, match=r"other\.pt"):
        build("defaults", None).load(tmp_path / "other.pt")


def test_the_rate_goes_on_from_the_saved_initial_one_whatever_the_new_optimizer_says(tmp_path):
    whole = build("schedule", None)
    trace = go(whole, 20)
    first = build("schedule", None)
    go(first, 8)
    first.save(tmp_path / "saved.pt")
    model = CASES["schedule"][0]()
    options = {**CASES["schedule"][3], "global_batch_size": None, "seed": 5, "total_samples": 2000}
    optimizer = torch.optim.SGD(model.parameters(), lr=7.0, momentum=0.9)
    second = make_engine(model, optimizer, make_data(61), CASES["schedule"][2](), **options)
    second.load(tmp_path / "saved.pt")
    assert go(second, 20) == trace[8:]


def test_skips_are_part_of_the_state(tmp_path):
    def loss(engine):
        def of(batch):
            factor = float("nan") if engine.steps % 4 == 2 else 1.0
            return factor * F.cross_entropy(engine.model(batch[0]), batch[1])

        return of

    def run(engine, until):
        trace = []
        for step in engine:
            step.run(loss(engine))
            trace.append((step.update().reason, engine.samples_seen, engine.samples_drawn, engine.skipped))
            if engine.steps == until:
                break
        return trace

    whole = build("every step", tmp_path / "whole")
    trace = run(whole, 20)
    assert sum(reason.startswith("skipped") for reason, *_ in trace) == 5
    for k in (2, 3, 4, 11):
        first = build("every step", tmp_path / str(k))
        head = run(first, k)
        first.save(tmp_path / "saved.pt")
        second = build("every step", tmp_path / str(k))
        second.load(tmp_path / "saved.pt")
        assert head + run(second, 20) == trace
        assert torch.equal(weights(second.model), weights(whole.model))
        assert read_log(tmp_path / str(k)) == read_log(tmp_path / "whole")


def test_a_state_can_be_gone_back_to_more_than_once():
    engine = build("every step", None)
    go(engine, 5)
    state = copy.deepcopy(engine.state_dict())
    trace, final = go(engine, 12), state_of(engine)
    for _ in range(2):  # the second time shows whether the first has trained on the state's own tensors
        engine.load_state_dict(state)
        assert go(engine, 12) == trace
        assert torch.equal(state_of(engine), final)


def test_no_state_is_loaded_while_a_step_is_under_way():
    engine = build("every step", None)
    go(engine, 2)
    state = copy.deepcopy(engine.state_dict())
    iterator = iter(engine)
    step = next(iterator)
    step.run(mean_loss(engine.model))
    with pytest.raises(StepError, match=r"a step is in progress: load after step\.update\(\)"):
        engine.load_state_dict(state)
    step.update()
    engine.load_state_dict(state)
    assert engine.steps == 2
    assert next(iterator).number == 3
    iterator.close()


def test_an_incomplete_state_is_refused_by_name_and_nothing_is_loaded():
    engine = build("every step", None)
    go(engine, 2)
    state = engine.state_dict()
    del state["stream"], state["random"]
    other = build("every step", None)
    before = weights(other.model)
    with pytest.raises(InvalidArgument, match=r"^state lacks random, stream: give what engine\.state_dict"):
        other.load_state_dict(state)
    assert torch.equal(before, weights(other.model))
    assert other.steps == 0


def test_a_state_of_another_model_or_optimizer_is_refused():
    engine = build("every step", None)
    go(engine, 2)
    model = make_model(0.3)
    groups = [{"params": layer.parameters()} for layer in (model[0], model[3])]
    for other in (
        make_engine(wide_model(), data=make_data(61), seed=5),
        make_engine(model, torch.optim.SGD(groups, lr=0.1), make_data(61), seed=5),
    ):
        with pytest.raises(InvalidArgument, match=r"state does not fit this model and optimizer.*build both as in"):
            other.load_state_dict(engine.state_dict())
        assert (other.steps, other._assembler.position) == (0, 0)


def test_a_loaded_size_obeys_the_new_cap_and_multiple():
    engine = build("schedule", None, total_samples=500)
    engine.global_batch_size = 48
    model = make_model(0.3)
    options = {"data": make_data(61), "policy": ada.StagedBatch({0: 10}), "seed": 5, "max_batch_size": 35}
    other = make_engine(model, CASES["schedule"][1](model), bounds=ada.Bounds(multiple_of=10), **options)
    other.load_state_dict(engine.state_dict())
    assert other.global_batch_size == 30


def test_after_a_resume_the_next_checkpoint_is_as_far_away_as_always(tmp_path):
    first = build("every step", tmp_path, checkpoint_every=100, total_samples=400)
    go(first, 10**9)
    second = build("every step", tmp_path, checkpoint_every=100, total_samples=600)
    assert second.resume()
    before, saved = second.samples_seen, sorted((tmp_path / "checkpoints").iterdir())
    assert before > 200
    assert len(saved) == 3
    go(second, second.steps + 1)
    assert second.samples_seen < before + 100
    assert sorted((tmp_path / "checkpoints").iterdir()) == saved
    go(second, 10**9)
    assert len(set((tmp_path / "checkpoints").iterdir()) - set(saved)) >= 1


def test_skips_in_a_row_are_counted_across_a_resume(tmp_path):
    def run(engine):
        for step in engine:
            step.run(lambda batch: mean_loss(engine.model)(batch) * float("nan"))
            step.update()
            if engine.steps == 30:
                break

    first = build("every step", None)
    run(first)
    first.save(tmp_path / "saved.pt")
    second = build("every step", None)
    second.load(tmp_path / "saved.pt")
    with pytest.raises(NonFiniteGradient, match=r"step 50 .*as in the 49 before"):
        run(second)


def test_a_first_step_left_in_the_middle_leaves_the_plan_of_measurements_alone():
    """Its trial runs tell what measuring costs; known too early, they would change when it is paid."""
    whole = build("defaults", None)
    trace = go(whole, STEPS)
    broken = build("defaults", None)
    for step in broken:
        for batch in step:
            step.backward(mean_loss(broken.model)(batch))
            break
        break
    torch.manual_seed(11)  # of the dropout masks
    assert go(broken, STEPS) == trace
    assert sum(reason != "not measured" for *_, reason in trace) >= 2
