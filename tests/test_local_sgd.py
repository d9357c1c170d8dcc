"""`LocalSGD`: with one local step synchronous training, with more the plain loop that averages by hand."""

from __future__ import annotations

import copy
import math
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
from adadagrad.core.errors import InvalidArgument
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
