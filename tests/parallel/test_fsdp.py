"""Many ranks train a model that `fully_shard` has sharded as one process trains the whole of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import adadagrad as ada
from adadagrad.core.mixing import seed_for
from adadagrad.core.records import Observation
from adadagrad.optimizers.adagrad_norm import AdaGradNorm
from adadagrad.parallel.fsdp import FullyShard
from adadagrad.policies.base import AbstractPolicy
from tests.engine.cases import WHOLE, make_data, make_engine, make_model, train
from tests.parallel import sharding
from tests.parallel.sharding import whole_weights
from tests.ranks import on_ranks

WAYS = ("whole", "layers", "one_part", "but_biases")
EVERY_SIZE = 40 if WHOLE else 13


@dataclass(frozen=True, slots=True)
class Between(AbstractPolicy):
    """Pseudo-random sizes of at least four examples, one for each rank."""

    needs: ClassVar[frozenset[str]] = frozenset()
    monotone: ClassVar[bool] = False
    largest: int = 40

    def required_batch_size(self, observation: Observation) -> float:
        return 4.0 + seed_for(1, observation.samples_seen) % (self.largest - 3)


def sgd(model: Any) -> torch.optim.Optimizer:
    """SGD with momentum; plain and sharded parameters apart, which torch does not mix."""
    plain = [p for p in model.parameters() if not hasattr(p, "placements")]
    cut = [p for p in model.parameters() if hasattr(p, "placements")]
    return torch.optim.SGD([{"params": group} for group in (plain, cut) if group], lr=0.05, momentum=0.9)


def adagrad_norm(model: Any) -> torch.optim.Optimizer:
    return AdaGradNorm(model.parameters(), lr=0.3)


def weighted(model: Any) -> Any:
    """Sums of losses and unequal weights, as of tokens."""

    def loss(batch: Any) -> Any:
        each = torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return (each * batch[3]).sum(), batch[3]

    return loss


CASES: dict[str, dict[str, Any]] = {
    "random sizes": {"policy": Between(largest=EVERY_SIZE), "micro_batch_size": 4, "total_samples": 203},
    "one at a time": {"policy": Between(largest=11), "micro_batch_size": 1, "total_samples": 61},
    "last batch smaller than the ranks": {"policy": ada.ConstantBatch(12), "micro_batch_size": 5, "total_samples": 25},
    "short epochs": {"policy": Between(), "micro_batch_size": 7, "total_samples": 250, "epoch_boundary": "short"},
    "weights": {"policy": Between(), "micro_batch_size": 3, "total_samples": 203, "weighted": True},
    "clipped, AdaGrad-Norm": {
        "policy": Between(),
        "micro_batch_size": 6,
        "total_samples": 203,
        "optimizer": adagrad_norm,
        "max_grad_norm": 0.2,
    },
}


def run(case: str, shard: str | None, dtype: torch.dtype, **options: bool) -> tuple[Any, Any, torch.Tensor]:
    settings = dict(CASES[case])
    make, by_weight = settings.pop("optimizer", sgd), settings.pop("weighted", False)
    model = make_model(dtype=dtype)
    parallel = None
    if shard is not None:
        getattr(sharding, shard)(model)
        parallel = FullyShard(model, **options) if options else None
    engine = make_engine(model, make(model), make_data(dtype=dtype), seed=3, parallel=parallel, **settings)
    decisions = train(engine, weighted(model) if by_weight else None)
    sizes = [d.plan.global_batch_size for d in decisions]
    return sizes, [d.observation.loss for d in decisions], whole_weights(model)


def plan(ranks: int) -> list[tuple[str, str, torch.dtype, bool]]:
    """Case, way to shard, precision, whether every micro-batch is reduced; fewer of them without ADADAGRAD_SLOW."""
    both = (torch.float32, torch.float64)
    found = [(case, "layers", dtype, True) for case in CASES for dtype in (both if WHOLE or ranks == 2 else both[1:])]
    found += [("random sizes", way, both[1], every) for way in WAYS for every in (True, False)]
    found += [("random sizes", "replicas", both[1], every) for every in (True, False)] if ranks == 4 else []
    return list(dict.fromkeys(found))


def of_rank(rank: int, ranks: int) -> Any:
    found = {key: run(*key[:3], reduce_every_micro_batch=key[3]) for key in plan(ranks)}
    return found, run("random sizes", "low_precision", torch.float32)


@pytest.mark.parametrize("ranks", [2, 4])
def test_same_sizes_and_weights_as_one_process(ranks: int) -> None:
    expected = {(case, d): run(case, None, d) for case in CASES for d in (torch.float32, torch.float64)}
    results = on_ranks(ranks, of_rank, ranks)
    for key, (sizes, losses, weights) in results[0][0].items():
        case, _, dtype, _ = key
        for other, _ in results[1:]:
            assert other[key][:2] == (sizes, losses), key
            assert torch.equal(other[key][2], weights), key
        bar = 1e-6 if dtype == torch.float32 else 1e-12
        assert sizes == expected[case, dtype][0]
        assert losses == pytest.approx(expected[case, dtype][1], abs=bar)
        assert float((weights - expected[case, dtype][2]).abs().max()) <= bar, key
    sizes, losses, weights = results[0][1]
    assert all(torch.equal(low[2], weights) for _, low in results)
    assert float((weights - expected["random sizes", torch.float32][2]).abs().max()) < 0.05
