"""`AdaptiveBatchTrainer` on two ranks under gloo, beside the raw Trainer, whose ranks come apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

from adadagrad import Measure, NormTest, StagedBatch
from adadagrad.core.errors import InvalidArgument
from adadagrad.integrations.transformers import AdaptiveBatchTrainer
from adadagrad.statistics import PerExample
from tests.integrations.transformers_cases import (
    Linear,
    OfGradientOne,
    Sharded,
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
GPT = StagedBatch({0: 6, 12: 9})


class Stop(TrainerCallback):
    """Ends the run at a step, as a user's callback may."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


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
    ours(path, model, sentences(30), our={"policy": GPT}, num_train_epochs=2, label_names=None)
    found["gpt"] = weights(model)
    found["resumed"] = [stopped_and_resumed(path / name, stop) for name, stop in (("whole", 99), ("parts", 4))]
    found["sharded"] = sharded(path / "sharded")
    return found


def stopped_and_resumed(folder: Path, step: int) -> tuple[list[int], list[float]]:
    settings = {"save_strategy": "steps", "save_steps": 2, "label_names": None, "num_train_epochs": 2}
    for resume in (False, True):
        args = arguments(folder, **settings)
        trainer = AdaptiveBatchTrainer(
            small_gpt(dropout=0.2),
            args,
            train_dataset=sentences(30),
            policy=GPT,
            callbacks=[] if resume else [Stop(step)],
        )
        trainer.train(resume_from_checkpoint=resume)
    return sizes(trainer), weights(trainer.model)


def sharded(folder: Path) -> dict[str, Any]:
    found = {}
    for resume in (None, str(folder / "checkpoint-6")):
        args = arguments(
            folder, label_names=None, num_train_epochs=2, max_grad_norm=1.0, save_strategy="steps", save_steps=3
        )
        trainer = Sharded(small_gpt(), args, train_dataset=sentences(30), policy=GPT)
        trainer.train(resume_from_checkpoint=resume)
        full = [p.full_tensor() if isinstance(p, DTensor) else p for p in trainer.model.parameters()]
        values = torch.cat([p.detach().reshape(-1) for p in full]).tolist()
        found["resumed" if resume else "whole"] = (sizes(trainer), values)
    found["shards"] = sum(isinstance(p, DTensor) for p in trainer.model.parameters())
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


def test_a_run_on_two_ranks_resumes_bit_for_bit(results):
    for rank in (0, 1):
        whole, parts = results[rank]["resumed"]
        assert parts == whole
    assert results[0]["resumed"] == results[1]["resumed"]


def test_a_sharded_model_trains_and_resumes_as_one_process_does(results, tmp_path):
    model = small_gpt()
    trainer = ours(
        tmp_path, model, sentences(30), our={"policy": GPT}, num_train_epochs=2, label_names=None, max_grad_norm=1.0
    )
    found = results[0]["sharded"]
    assert found["shards"] > 10
    assert found["whole"] == results[1]["sharded"]["whole"]
    assert found["whole"][0] == sizes(trainer)
    assert found["whole"][1] == pytest.approx(weights(model), abs=1e-6)
    assert found["resumed"] == found["whole"]


def test_fsdp_1_is_refused(tmp_path):
    class First(Sharded):
        version = 1

    with pytest.raises(InvalidArgument, match=r"FSDP 1 does, which is not supported: set fsdp_config=.*2"):
        First(small_gpt(), arguments(tmp_path), train_dataset=sentences(4), policy=GPT)
