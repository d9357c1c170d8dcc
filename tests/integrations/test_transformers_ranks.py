"""`AdaptiveBatchTrainer` on two ranks under gloo, beside the raw Trainer, whose ranks come apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import Trainer

from adadagrad import Measure, NormTest, StagedBatch
from adadagrad.integrations.transformers import AdaptiveBatchTrainer
from adadagrad.statistics import PerExample
from tests.integrations.transformers_cases import (
    Linear,
    OfGradientOne,
    Watching,
    arguments,
    as_one_of,
    rows,
    sentences,
    sizes,
    small_gpt,
)
from tests.ranks import on_two_ranks

GROWING = StagedBatch({0: 16, 48: 40, 168: 24, 300: 60})


def weights(model: Any) -> list[float]:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).tolist()


def raw(folder: Path, step: int) -> Watching:
    watching = Watching({step: 4})
    args = arguments(folder, gradient_accumulation_steps=2, num_train_epochs=1, ddp_find_unused_parameters=False)
    Trainer(Linear(), args, train_dataset=rows(800), callbacks=[watching]).train()
    return watching


def ours(folder: Path, model: Any, data: Any, watching: Watching | None = None, our: Any = None, **changed: Any) -> Any:
    our = {"policy": GROWING} if our is None else our
    callbacks = [] if watching is None else [watching]
    args = arguments(folder, **({"num_train_epochs": 4} | changed))
    trainer = AdaptiveBatchTrainer(model, args, train_dataset=data, callbacks=callbacks, **our)
    trainer.train()
    return trainer


def on_rank(rank: int, folder: str) -> dict[str, Any]:
    as_one_of(rank, 2)
    torch.manual_seed(0)
    path = Path(folder)
    found: dict[str, Any] = {"cut": raw(path, 3), "aligned": raw(path, 4)}
    watching, model = Watching(), Linear()
    trainer = ours(path, model, rows(101), watching)
    found["ours"] = (watching, model.seen, sizes(trainer), weights(model))
    watching = Watching()
    ours(path, OfGradientOne(), rows(101), watching)
    found["one"] = watching
    model = Linear()
    our = {"policy": NormTest(eta=0.5), "measure": Measure(every=2, estimator=PerExample()), "max_batch_size": 64}
    watching = Watching()
    trainer = ours(path, model, rows(100), watching, our, optim="adagrad", per_device_train_batch_size=4)
    found["tested"] = (watching, sizes(trainer), weights(model), trainer.args.world_size)
    model = small_gpt()
    ours(path, model, sentences(30), our={"policy": StagedBatch({0: 6, 12: 9})}, num_train_epochs=2, label_names=None)
    found["gpt"] = weights(model)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return on_two_ranks(on_rank, str(tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize("rank", [0, 1])
def test_trainers_own_ranks_come_apart_where_a_change_is_not_aligned(results, rank):
    cut, aligned = results[rank]["cut"], results[rank]["aligned"]
    assert max(cut.apart[:3]) == 0.0
    assert min(cut.apart[3:]) > 1e-4
    assert max(aligned.apart) == 0.0


@pytest.mark.parametrize("rank", [0, 1])
def test_ours_stay_together_whatever_the_batch_does(results, rank):
    watching, _, trace, _ = results[rank]["ours"]
    assert trace == [16, 16, 16, 40, 40, 40, 24, 24, 24, 24, 24, 24, 60, 32]
    assert watching.apart == [0.0] * 14
    assert max(results[rank]["tested"][0].apart) == 0.0
    assert results[0]["gpt"] == results[1]["gpt"]


def test_every_example_comes_once_in_every_epoch_on_one_of_the_ranks(results):
    seen = [results[rank]["ours"][1] for rank in (0, 1)]
    stream = [index for pair in zip(*seen, strict=True) for index in pair]
    assert len(stream) == 404
    for epoch in range(4):
        assert sorted(stream[epoch * 101 : (epoch + 1) * 101]) == list(range(101))


@pytest.mark.parametrize("rank", [0, 1])
def test_every_step_has_the_gradient_of_its_examples_the_last_partial_one_too(results, rank):
    assert results[rank]["one"].gradients == pytest.approx([1.0] * 14, abs=1e-6)


def test_two_ranks_train_as_one_process_does(results, tmp_path):
    model = Linear()
    trainer = ours(tmp_path, model, rows(101))
    assert sizes(trainer) == results[0]["ours"][2]
    assert weights(model) == pytest.approx(results[0]["ours"][3], abs=1e-6)
    our = {"policy": NormTest(eta=0.5), "measure": Measure(every=2, estimator=PerExample()), "max_batch_size": 64}
    model = Linear()
    trainer = ours(tmp_path, model, rows(100), our=our, optim="adagrad")
    _, trace, theirs, count = results[0]["tested"]
    assert count == 2
    assert sizes(trainer) == trace
    assert len(set(trace)) > 2
    assert weights(model) == pytest.approx(theirs, abs=1e-6)


def test_tokens_weigh_alike_on_all_ranks(results, tmp_path):
    model = small_gpt()
    ours(
        tmp_path, model, sentences(30), our={"policy": StagedBatch({0: 6, 12: 9})}, num_train_epochs=2, label_names=None
    )
    assert weights(model) == pytest.approx(results[0]["gpt"], abs=1e-6)
