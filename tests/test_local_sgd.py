"""`LocalSGD`: with one local step synchronous training, with more the plain loop that averages by hand."""

from __future__ import annotations

import copy
import math
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import adadagrad as ada
from adadagrad.batching import SampleOrder
from adadagrad.core.errors import InvalidArgument, NonFiniteGradient, RanksDisagree, StepError
from tests.engine.cases import Sizes, make_data, make_engine, make_model, mean_loss, read_log, train, weights
from tests.ranks import on_ranks

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "nesterov": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.05),
    "adagrad-norm": lambda ps: ada.AdaGradNorm(ps, lr=0.05),
}


def local(h: Any, make: Any = OPTIMIZERS["sgd"], policy: Any = None, model: Any = None, **options: Any) -> Any:
    """An engine under local steps; options whose names begin with an underscore are LocalSGD's."""
    model = make_model() if model is None else model
    optimizer = make(model.parameters())
    own = {name[1:]: options.pop(name) for name in list(options) if name.startswith("_")}
    parallel = ada.LocalSGD(model, optimizer, h, **own)
    policy = ada.ConstantBatch(12) if policy is None else policy
    return make_engine(model, optimizer, policy=policy, parallel=parallel, seed=3, **options)


def together(model: nn.Module) -> float:
    """Largest difference between any rank's weights and the mean of all."""
    own = weights(model)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    return max(float((other - own).abs().max()) for other in found)


# H = 1 is synchronous training


def one_step(rank: int, ranks: int, weighted: bool) -> Any:
    found = {}
    for name in ("sgd", "momentum", "nesterov"):
        for policy in (ada.ConstantBatch(12), Sizes(largest=30, seed=2)):
            own, kept = local(1, OPTIMIZERS[name], policy), []
            reference = make_model()
            wrapped = DistributedDataParallel(reference)
            ddp = make_engine(wrapped, OPTIMIZERS[name](reference.parameters()), policy=policy, seed=3)
            for engine in (own, ddp):

                def loss(batch: Any, engine: Any = engine) -> Any:
                    if not weighted:
                        return mean_loss(engine.model)(batch)
                    rows = F.cross_entropy(engine.model(batch[0]), batch[1], reduction="none")
                    return (rows * batch[3]).sum(), batch[3]

                kept.append([(d.plan.global_batch_size, d.observation.loss) for d in train(engine, loss)])
            key = (name, type(policy).__name__)
            apart = float((weights(own.model) - weights(reference)).abs().max())
            losses = max(abs(a[1] - b[1]) for a, b in zip(*kept, strict=True))
            found[key] = (apart, losses, [a[0] for a in kept[0]] == [b[0] for b in kept[1]], together(own.model))
    return found


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ranks", [2, 3])
def test_one_local_step_is_ddp(ranks: int, weighted: bool) -> None:
    for found in on_ranks(ranks, one_step, ranks, weighted):
        assert len(found) == 6
        for key, (apart, losses, same, between) in found.items():
            assert apart < 1e-12, key
            assert losses < 1e-12, key
            assert same, key
            assert between == 0.0, key


# H > 1 beside the plain loop


def by_hand(rank: int, ranks: int, name: str, h: int, state: str) -> tuple[torch.Tensor, list[float]]:
    """Local steps as a user would write them, on batches of 12, one optimizer a rank, averaged by rank 0's own sums."""
    data, order = make_data(), SampleOrder(203, seed=3)
    models = [make_model() for _ in range(ranks)]
    optimizers = [OPTIMIZERS[name](model.parameters()) for model in models]
    first = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    moved = []
    for number in range(7):
        for r in range(ranks):
            rows = order.indices(12 * number, 12)[r::ranks]
            F.cross_entropy(models[r](data.tensors[0][rows]), data.tensors[1][rows]).backward()
            optimizers[r].step()
            optimizers[r].zero_grad()
        if (number + 1) % h == 0 or number == 6:
            with torch.no_grad():
                for ps in zip(*(model.parameters() for model in models), strict=True):
                    mean = sum(ps) / ranks
                    for p in ps:
                        p.copy_(mean)
                if state == "average":
                    for ps in zip(*(model.parameters() for model in models), strict=True):
                        states = [optimizer.state[p] for optimizer, p in zip(optimizers, ps, strict=True)]
                        for key in states[0]:
                            if key != "step":
                                mean = sum(s[key] for s in states) / ranks
                                for s in states:
                                    s[key] = mean.clone()
                    if name == "adagrad-norm":
                        mean = sum(o.param_groups[0]["accumulator"] for o in optimizers) / ranks
                        for o in optimizers:
                            o.param_groups[0]["accumulator"] = mean.clone()
            if state == "reset":
                for optimizer, start in zip(optimizers, first, strict=True):
                    optimizer.load_state_dict(copy.deepcopy(start))
            moved.append(float(weights(models[rank]).sum()))
    return weights(models[rank]), moved


def several(rank: int) -> Any:
    found = {}
    for name in OPTIMIZERS:
        for state in ("average", "local", "reset"):
            for h in (2, 3):
                engine = local(h, OPTIMIZERS[name], _optimizer_state=state, total_samples=7 * 12)
                train(engine)
                expected, _ = by_hand(rank, 2, name, h, state)
                apart = float((weights(engine.model) - expected).abs().max())
                found[name, state, h] = (apart, together(engine.model), engine.parallel.rounds)
    return found


def test_local_steps_are_the_plain_loop() -> None:
    for found in on_ranks(2, several):
        assert len(found) == 36
        for key, (apart, between, rounds) in found.items():
            assert apart < 1e-12, key
            assert between == 0.0, key
            assert rounds == math.ceil(7 / key[2])


# The noise at a meeting


def gradient_of(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    data = make_data()
    loss = F.cross_entropy(model(data.tensors[0][rows]), data.tensors[1][rows])
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def noise(rank: int, b: int) -> Any:
    """Every measured number beside the definition, on the gradients of the round's last step."""
    found = []
    order = SampleOrder(203, seed=3)
    for estimator in (ada.Worker(), ada.PerExample(), ada.MicroBatch(units=2)):
        engine = local(
            3,
            policy=ada.NormTest(eta=0.5),
            measure=ada.Measure(estimator=estimator, every=1, max_examples=None),
            global_batch_size=b,
            max_batch_size=b,
            min_batch_size=b,
            bounds=ada.Bounds(monotone=False),
            total_samples=6 * b,
        )
        for number, step in enumerate(engine):
            before = copy.deepcopy(engine.model)
            step.run(mean_loss(engine.model))
            seen = step.update().observation.gradient
            assert (seen is None) == (number % 3 < 2)
            if seen is None:
                continue
            rows = order.indices(b * number, b)
            mine = rows[(rank - b * number) % 2 :: 2]
            own = gradient_of(before, mine)
            sizes, grads = [None, None], [None, None]
            dist.all_gather_object(sizes, len(mine))
            dist.all_gather_object(grads, own)
            mean = sum(n * g for n, g in zip(sizes, grads, strict=True)) / b
            if isinstance(estimator, ada.Worker):
                v = sum(n * float((g - mean).square().sum()) for n, g in zip(sizes, grads, strict=True))
            else:
                half = [mine[: -(-len(mine) // 2)], mine[-(-len(mine) // 2) :]]
                units = [mine[i : i + 1] for i in range(len(mine))] if isinstance(estimator, ada.PerExample) else half
                inside = sum(len(u) * float((gradient_of(before, u) - own).square().sum()) for u in units)
                parts = [None, None]
                dist.all_gather_object(parts, (inside, len(units) - 1))
                v = sum(p[0] for p in parts) / sum(p[1] for p in parts)
            s = float(mean.square().sum())
            found.append((seen.variance_trace / v - 1, seen.grad_norm_sq / s - 1, seen.num_examples == b))
    return found


@pytest.mark.parametrize("b", [12, 13])
def test_noise_is_the_definition(b: int) -> None:
    for found in on_ranks(2, noise, b):
        assert len(found) == 6
        for v, s, size in found:
            assert abs(v) < 1e-10
            assert abs(s) < 1e-10
            assert size


def drifts(rank: int) -> Any:
    """For SGD and one step a round the drifts are the gradients, times the learning rate."""
    pairs = []
    for h in (1, 4):
        own = local(h, policy=ada.NormTest(eta=0.9), _noise="drifts", global_batch_size=12, total_samples=12 * 8)
        other = local(
            h,
            policy=ada.NormTest(eta=0.9),
            global_batch_size=12,
            total_samples=12 * 8,
            measure=ada.Measure(estimator=ada.Worker(), every=1),
            bounds=ada.Bounds(monotone=False),
        )
        first = [next(d for d in train(engine) if d.observation.gradient) for engine in (own, other)]
        pairs.append([
            (d.step, d.requested, d.observation.gradient.kind, d.observation.gradient.noise_scale) for d in first
        ])
    return pairs


def test_drifts() -> None:
    found = on_ranks(2, drifts)
    assert found[0] == found[1]
    (one, gradients), (four, other) = found[0]
    assert (one[0], four[0], other[0]) == (1, 4, 4)
    assert one[2] == four[2] == "drift"
    assert one[1] == pytest.approx(gradients[1], rel=1e-9)
    assert one[3] == pytest.approx(gradients[3], rel=1e-9)
    assert 0.2 < four[1] / other[1] < 5  # one estimate with one degree of freedom beside another


def trace(rank: int) -> Any:
    """A test that grows the batch, with momentum, at the default settings: every rank decides the same."""
    engine = local(
        lambda seen: 2 if seen < 300 else 5,
        OPTIMIZERS["momentum"],
        ada.NormTest(eta=0.4),
        total_samples=1_500,
        max_batch_size=64,
    )
    decisions = train(engine)
    return [(d.step, d.samples_seen, d.plan.global_batch_size, d.reason) for d in decisions], weights(engine.model)


def test_all_ranks_decide_the_same_at_meetings_only() -> None:
    (first, w), (second, other) = on_ranks(2, trace)
    assert first == second
    assert torch.equal(w, other)
    sizes = [size for _, _, size, _ in first]
    assert sizes[-2] > sizes[0]
    decided = [step for step, _, _, reason in first if reason != "local step"]
    assert decided[:3] == [2, 4, 6]
    changed = [step for step, before, after in zip(range(1, 99), sizes, sizes[1:], strict=False) if before != after]
    assert set(changed) <= set(decided)


# What is sent, and written down


def sent(rank: int, folder: str) -> Any:
    counts = {}
    whole = dist.all_reduce
    for h in (1, 4):
        engine = local(h, total_samples=12 * 8, log_dir=f"{folder}/{h}-{rank}")
        total = 0

        def counting(tensor: Any, *arguments: Any, **named: Any) -> Any:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return whole(tensor, *arguments, **named)

        dist.all_reduce = counting
        try:
            before = engine.parallel.bytes_sent
            train(engine)
        finally:
            dist.all_reduce = whole
        counts[h] = (engine.parallel.bytes_sent - before, total, engine.parallel.rounds)
    return counts


def test_bytes_and_rounds(tmp_path: Path) -> None:
    parameters = 8 * weights(make_model()).numel()
    for counts in on_ranks(2, sent, str(tmp_path)):
        for h, (own, counted, rounds) in counts.items():
            assert own == counted
            assert rounds == 8 // h
            assert own == rounds * (parameters + 88 + 16)
    lines = read_log(tmp_path / "4-0")
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["rounds"] for line in steps] == [0, 0, 0, 1, 1, 1, 1, 2]
    assert lines[-1]["kind"] == "end"
    assert lines[-1]["bytes_sent"] == steps[-1]["bytes_sent"] > steps[0]["bytes_sent"]


# Faults and resuming


def poisoned(rank: int, on_nonfinite: str) -> Any:
    engine = local(2, policy=ada.ConstantBatch(12), total_samples=96, on_nonfinite=on_nonfinite)

    def loss(batch: Any) -> Any:
        bad = rank == 1 and engine.steps in (2, 3, 4)
        return mean_loss(engine.model)(batch) * (math.nan if bad else 1.0)

    if on_nonfinite == "stop":
        with pytest.raises(NonFiniteGradient, match="2 local updates before step 4"):
            train(engine, loss)
        return engine.steps
    decisions = train(engine, loss)
    return [d.samples_seen for d in decisions], engine.skipped, engine.samples_drawn, weights(engine.model)


def test_a_rank_that_is_not_finite() -> None:
    (seen, skipped, drawn, w), other = on_ranks(2, poisoned, "skip")
    assert seen == [12, 24, 36, 36, 48, 54, 66, 78, 90, 96]  # rank 1's 6 of a step, taken off where the ranks meet
    assert (skipped, drawn) == (3, 96 + 3 * 6)
    assert bool(w.isfinite().all())
    assert torch.equal(w, other[3])
    assert on_ranks(2, poisoned, "stop") == [3, 3]


def saved(rank: int, folder: str, state: str) -> Any:
    def build(log: str | None = None) -> Any:
        return local(
            3,
            OPTIMIZERS["adam"],
            ada.NormTest(eta=0.4),
            make_model_with_dropout(),
            _optimizer_state=state,
            total_samples=600,
            log_dir=log,
        )

    whole, found = build(), []
    for step in whole:
        step.run(mean_loss(whole.model))
        step.update()
        if whole.steps == 4:
            with pytest.raises(StepError, match="middle of a round"):
                whole.save(f"{folder}/no.pt")
        if whole.steps in (3, 6):
            whole.save(f"{folder}/{whole.steps}.pt")
    for k in (3, 6):
        again = build()
        again.load(f"{folder}/{k}.pt")
        assert again.parallel.rounds == k // 3
        train(again)
        found.append(torch.equal(weights(again.model), weights(whole.model)) and again.steps == whole.steps)
    return found


def make_model_with_dropout() -> nn.Module:
    return make_model(0.3)


@pytest.mark.parametrize("state", ["average", "local"])
def test_resuming_from_a_meeting_bit_for_bit(state: str, tmp_path: Path) -> None:
    assert on_ranks(2, saved, str(tmp_path), state) == [[True, True], [True, True]]


def unlike(rank: int) -> str:
    """One rank's optimizer has a momentum that the other's has not: there is no mean, and nobody waits."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    parallel = ada.LocalSGD(model, optimizer, 1)
    if rank == 0:
        mean_loss(model)([t[:4] for t in make_data().tensors]).backward()
        optimizer.step()
    parallel.begin_step(1, 0)
    with pytest.raises(RanksDisagree, match='optimizer_state="local"'):
        parallel.after_update(4, 4.0)
    return "refused"


def test_optimizers_that_have_no_mean() -> None:
    assert on_ranks(2, unlike) == ["refused", "refused"]


# One process, and arguments


def test_one_process_is_plain_training() -> None:
    own, plain = local(4, total_samples=300), make_engine(make_model(), policy=ada.ConstantBatch(12), seed=3)
    plain.total_samples = 300
    train(own)
    train(plain)
    assert float((weights(own.model) - weights(plain.model)).abs().max()) < 1e-12
    assert own.parallel.rounds == math.ceil(300 / 12 / 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_steps": 0}, "local_steps must be"),
        ({"local_steps": 2.5}, "local_steps must be"),
        ({"optimizer_state": "mean"}, "unknown optimizer_state"),
        ({"noise": "loud"}, "unknown noise"),
        ({"noise": "drifts"}, "compares several ranks"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    model = make_model()
    with pytest.raises(InvalidArgument, match=message):
        ada.LocalSGD(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def test_a_schedule_that_returns_nonsense() -> None:
    with pytest.raises(InvalidArgument, match="local_steps must be"):
        train(local(lambda seen: 0))


def refused(rank: int) -> list[str]:
    model = make_model()
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {"policy": ada.DiveBatch(delta=0.1)}),
        ({}, {"policy": ada.CoordinateNormTest(eta=0.5)}),
        ({}, {"policy": ada.NormTest(eta=0.5), "bounds": ada.Bounds(confidence=0.9)}),
        ({}, {"policy": ada.InnerProductTest(theta=0.9), "measure": ada.Measure(estimator=ada.PerExample())}),
        ({"noise": "drifts"}, {"policy": ada.CABS()}),
        ({"noise": "drifts"}, {"policy": ada.NormTest(eta=0.5), "rate": ada.AdaScale()}),
        ({"noise": "drifts"}, {"policy": ada.NormTest(eta=0.5), "measure": ada.Measure(estimator=ada.Worker())}),
    ]
    found = []
    for own, options in cases:
        with pytest.raises(InvalidArgument) as error:
            local(2, model=model, **{f"_{k}": v for k, v in own.items()}, **options)
        found.append(str(error.value))
    wrapped = DistributedDataParallel(model)
    with pytest.raises(InvalidArgument, match="wrapped or sharded"):
        ada.LocalSGD(wrapped, torch.optim.SGD(model.parameters(), lr=0.1))
    return found


def test_settings_that_contradict_local_steps() -> None:
    words = ("epoch", "coordinate", "confidence", "inside each rank", "more of it", "comes after", "takes the place")
    for found in on_ranks(2, refused):
        for message, word in zip(found, words, strict=True):
            assert word in message


# Data that differ from rank to rank


def own_data(rank: int) -> Any:
    """Each rank reads all of its own set and nothing else; V inside ranks does not see what lies between them."""
    data = torch.utils.data.TensorDataset(*(t[t.new_tensor(range(rank, 203, 2)).long()] for t in make_data().tensors))
    seen: list[int] = []
    found = {}
    for estimator in (ada.Worker(), ada.PerExample()):
        engine = local(
            2,
            policy=ada.NormTest(eta=100.0),
            data=data,
            _own_data=True,
            measure=ada.Measure(estimator=estimator, every=1, max_examples=None),
            global_batch_size=20,
            total_samples=2 * 2 * 101,
        )

        def loss(batch: Any, engine: Any = engine) -> Any:
            seen.extend(batch[2].tolist())
            return F.cross_entropy(engine.model(batch[0]), torch.full_like(batch[1], 2 * rank))

        first = next(d for d in train(engine, loss) if d.observation.gradient)
        found[type(estimator).__name__] = first.observation.gradient.variance_trace
        assert engine.dataset_size == 203
    return sorted(seen), found, weights(engine.model)


def test_data_of_its_own_on_every_rank() -> None:
    (first, noise_0, w), (second, noise_1, other) = on_ranks(2, own_data)
    assert set(first) == set(range(0, 203, 2))
    assert second == sorted(4 * list(range(1, 203, 2)))  # two epochs of 101, in each of two runs
    assert noise_0 == noise_1
    assert noise_0["Worker"] > 3 * noise_0["PerExample"]
    assert torch.equal(w, other)


def saves_by_itself(rank: int, folder: str) -> Any:
    """Saved and stopped where the ranks meet, though both fall due in the middle of a round; then resumed."""

    def build(name: str) -> Any:
        options = {"log_dir": f"{folder}/{name}", "checkpoint_every": 30, "total_samples": 240}
        return local(3, OPTIMIZERS["momentum"], model=make_model(0.3), **options)

    whole = build("whole")
    train(whole)
    told, status = build("told"), None
    try:
        for step in told:
            if told.steps == 6 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            step.run(mean_loss(told.model))
            step.update()
    except SystemExit as left:
        status = left.code
    again = build("told")
    resumed = again.resume()
    stopped_at = again.steps
    train(again)
    saved = sorted(path.name for path in Path(f"{folder}/whole/checkpoints").iterdir())
    return status, resumed, stopped_at, torch.equal(weights(again.model), weights(whole.model)), saved


def test_saving_and_stopping_wait_for_a_meeting(tmp_path: Path) -> None:
    names = [f"step-{step:09d}.pt" for step in (12, 15, 18)]
    assert on_ranks(2, saves_by_itself, str(tmp_path)) == [(143, True, 9, True, names)] * 2
    assert read_log(tmp_path / "told") == read_log(tmp_path / "whole")


def short_of_memory(rank: int) -> Any:
    """Rank 1 runs out of memory where the ranks meet, and repeats its step alone; rank 0 waits for nothing more."""
    engines = [
        local(2, policy=ada.NormTest(eta=0.5), global_batch_size=16, max_batch_size=64, total_samples=600)
        for _ in range(2)
    ]
    failed: list[int] = []

    def loss(batch: Any) -> Any:
        if rank == 1 and engines[0].steps in (1, 3, 4) and engines[0].steps not in failed:
            failed.append(engines[0].steps)
            raise torch.OutOfMemoryError
        return mean_loss(engines[0].model)(batch)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        sizes = [[d.plan.global_batch_size for d in train(engines[0], loss)]]
    sizes.append([d.plan.global_batch_size for d in train(engines[1])])
    apart = float((weights(engines[0].model) - weights(engines[1].model)).abs().max())
    return sizes[0] == sizes[1], apart < 1e-12, engines[0].memory_retries, len(set(sizes[0])) > 1


def test_memory_that_runs_out_on_one_rank() -> None:
    assert on_ranks(2, short_of_memory) == [(True, True, 0, True), (True, True, 3, True)]


def broken(rank: int) -> Any:
    """An error in the middle of a round, after which the run goes back to a checkpoint."""
    engine = local(3, total_samples=120)
    state = copy.deepcopy(engine.state_dict())

    def loss(batch: Any) -> Any:
        return mean_loss(engine.model)(batch) if engine.steps != 4 else 1 / 0

    with pytest.raises(ZeroDivisionError):
        train(engine, loss)
    assert not engine.parallel.together
    engine.load_state_dict(state)
    train(engine)
    whole = local(3, total_samples=120)
    train(whole)
    return torch.equal(weights(engine.model), weights(whole.model)), engine.parallel.rounds


def test_going_back_from_the_middle_of_a_round() -> None:
    assert on_ranks(2, broken) == [(True, 4), (True, 4)]


def lost_at_the_end(rank: int) -> Any:
    def loss(batch: Any) -> Any:
        return mean_loss(engine.model)(batch) * (math.nan if rank == 0 and engine.steps == 5 else 1)

    engine = local(4, total_samples=72, on_nonfinite="stop")
    with pytest.raises(NonFiniteGradient, match="1 local updates before the end"):
        train(engine, loss)
    engine = local(4, total_samples=72)
    train(engine, loss)
    return engine.samples_seen, engine.samples_drawn, engine.skipped, weights(engine.model)


def test_what_is_left_out_in_a_round_that_the_end_cuts_short() -> None:
    (*counts, w), (*others, other) = on_ranks(2, lost_at_the_end)
    assert counts == others == [66, 72, 1]
    assert torch.equal(w, other)


def weightless_part(rank: int) -> Any:
    """A measured micro-batch of rank 1 weighs nothing: no rank has statistics, and none waits for a vector."""
    engine = local(
        2,
        policy=ada.NormTest(eta=0.5),
        measure=ada.Measure(estimator=ada.MicroBatch(units=2), every=1),
        global_batch_size=16,
        micro_batch_size=4,
        total_samples=96,
    )
    calls: list[int] = []

    def loss(batch: Any) -> Any:
        calls.append(len(calls))
        weight = torch.full((len(batch[0]),), float(rank == 0 or len(calls) % 2), dtype=torch.float64)
        return (F.cross_entropy(engine.model(batch[0]), batch[1], reduction="none") * weight).sum(), weight

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        decisions = train(engine, loss)
    return [d.reason for d in decisions], together(engine.model)


def test_a_measurement_that_fails_on_one_rank() -> None:
    for reasons, apart in on_ranks(2, weightless_part):
        assert reasons == 3 * ["local step", "measurement failed"]
        assert apart == 0.0


def weightless_rank(rank: int) -> Any:
    """All examples of rank 1 weigh nothing in some steps, as those of a batch of padding do."""
    models = [make_model(), make_model()]
    engines = [
        local(1, OPTIMIZERS["momentum"], model=models[0], total_samples=96),
        make_engine(
            DistributedDataParallel(models[1]),
            OPTIMIZERS["momentum"](models[1].parameters()),
            policy=ada.ConstantBatch(12),
            seed=3,
            total_samples=96,
        ),
    ]
    losses = []
    for engine in engines:

        def loss(batch: Any, engine: Any = engine) -> Any:
            weight = batch[3] * float(rank == 0 or engine.steps % 3 != 1)
            return (F.cross_entropy(engine.model(batch[0]), batch[1], reduction="none") * weight).sum(), weight

        losses.append([d.observation.loss for d in train(engine, loss)])
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    return len(losses[0]), apart, engines[0].samples_seen, float((weights(models[0]) - weights(models[1])).abs().max())


def test_a_rank_whose_examples_weigh_nothing() -> None:
    for steps, losses, seen, apart in on_ranks(2, weightless_rank):
        assert (steps, seen) == (8, 96)
        assert losses < 1e-12
        assert apart < 0.02  # a rank without an example leaves its momentum alone


def nothing_finite(rank: int) -> Any:
    """No rank has a finite loss where the second round ends: the loss that `CABS` averages is that of other steps."""
    measure = ada.Measure(estimator=ada.Worker(), every=1)
    engine = local(2, policy=ada.CABS(), global_batch_size=12, total_samples=120, measure=measure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return train(engine, lambda batch: mean_loss(engine.model)(batch) * (math.nan if engine.steps == 3 else 1))


def test_a_meeting_without_a_finite_loss_is_forgotten() -> None:
    for decisions in on_ranks(2, nothing_finite):
        averages = [d.observation.loss_average for d in decisions[1::2]]
        assert averages[1] == averages[0]
        assert all(math.isfinite(average) for average in averages)
        assert not any(d.reason.startswith("nan") for d in decisions)


def test_local_steps_go_on_from_a_run_without_them(tmp_path: Path) -> None:
    model = make_model()
    first = make_engine(model, OPTIMIZERS["sgd"](model.parameters()), policy=ada.ConstantBatch(12), seed=3)
    first.save(tmp_path / "plain.pt")
    second = local(4)
    second.load(tmp_path / "plain.pt")
    assert second.parallel.rounds == 0


def late(rank: int, name: str) -> Any:
    """Rank 1 has made no update when the ranks first meet, and its optimizer remembers nothing yet."""
    engine = local(2, OPTIMIZERS[name], total_samples=120)
    first = (0, 1) if rank == 1 else ()
    train(engine, lambda batch: mean_loss(engine.model)(batch) * (math.nan if engine.steps in first else 1.0))
    state = [v for own in engine.optimizer.state.values() for k, v in sorted(own.items()) if k != "step"]
    return engine.skipped, weights(engine.model), state


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_a_rank_whose_first_updates_are_left_out(name: str) -> None:
    (skipped, w, state), (_, other, others) = on_ranks(2, late, name)
    assert skipped == 2
    assert torch.equal(w, other)
    assert len(state) == len(others) > 0
    assert all(torch.equal(a, b) for a, b in zip(state, others, strict=True))


def with_weights(rank: int) -> Any:
    """After one local step the mean gradient is that of DistributedDataParallel, weights of examples included."""
    found = []
    for estimator in (ada.Worker(), ada.PerExample(), ada.MicroBatch(units=2)):
        squares = []
        for apart in (True, False):
            options: dict[str, Any] = {
                "policy": ada.NormTest(eta=0.5),
                "measure": ada.Measure(estimator=estimator, every=1, max_examples=None),
                "global_batch_size": 13,
                "total_samples": 52,
            }
            model = make_model()
            if apart:
                engine = local(1, model=model, **options)
            else:
                optimizer = OPTIMIZERS["sgd"](model.parameters())
                engine = make_engine(DistributedDataParallel(model), optimizer, seed=3, **options)

            def loss(batch: Any, engine: Any = engine) -> Any:
                rows = F.cross_entropy(engine.model(batch[0]), batch[1], reduction="none")
                return (rows * batch[3]).sum(), batch[3]

            seen = train(engine, loss, steps=1)[0].observation.gradient
            squares.append((seen.grad_norm_sq, seen.variance_trace, seen.weight_sq_sum))
        found.append(squares)
    return found


def test_weights_enter_the_mean_gradient() -> None:
    for found in on_ranks(2, with_weights):
        for number, (own, ddp) in enumerate(found):
            assert own[0] == pytest.approx(ddp[0], rel=1e-10)
            assert own[2] == pytest.approx(ddp[2], rel=1e-10)
            assert number > 0 or own[1] == pytest.approx(ddp[1], rel=1e-10)  # of Worker


def strides(rank: int) -> Any:
    """Parameters and buffers that do not fill the memory that they lie in."""
    torch.manual_seed(rank)
    model = nn.Module()
    model.turned = nn.Parameter(torch.randn(3, 4).t())
    model.register_buffer("part", torch.randn(5, 4)[:, 1:3])
    model.register_buffer("repeated", torch.arange(3).expand(200, 3))
    model.register_buffer("mask", torch.rand(9) > 0.5)
    ada.LocalSGD(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return [tensor.tolist() for tensor in model.state_dict().values()]


def test_all_ranks_begin_with_the_same_model_whatever_its_strides() -> None:
    first, second = on_ranks(2, strides)
    assert first == second
