"""The tasks' parts share no example and lose none, and each task trains and evaluates what it says."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from adadagrad.batching import make_source
from adadagrad.batching.source import MemorySource
from adadagrad.cli.data import load_data
from adadagrad.core.errors import InvalidData
from benchmarks import splits
from benchmarks.tasks import OPTIMIZERS, TASKS, Task, around
from tests.cli.mnist_folder import real_data, write_mnist


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What was read from a folder of a test is not kept."""
    yield
    for load in (splits.digits, splits.mnist, splits.shakespeare):
        load.cache_clear()


def rows(*parts: TensorDataset) -> list[tuple[float, ...]]:
    return sorted(
        (float(label), *image.flatten().tolist()) for part in parts for image, label in zip(*part.tensors, strict=True)
    )


def test_digits_are_whole_and_cut_at_60_and_80_percent() -> None:
    found = splits.digits("")
    assert [len(part) for part in found] == [1078, 359, 360]
    data = load_data("digits")
    assert rows(*found) == rows(data.train, data.held_out)
    assert rows(found.test) == rows(data.held_out)
    splits.digits.cache_clear()
    again = splits.digits("")
    assert all(a.tensors[0].equal(b.tensors[0]) for a, b in zip(found, again, strict=True))


def test_the_last_5000_training_images_of_mnist_validate(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist", train=5013, test=7)
    found = splits.mnist(str(tmp_path))
    assert [len(part) for part in found] == [13, 5000, 7]
    data = load_data(f"mnist:{tmp_path / 'mnist'}")
    assert torch.cat([found.train.tensors[0], found.val.tensors[0]]).equal(data.train.tensors[0])
    assert torch.cat([found.train.tensors[1], found.val.tensors[1]]).equal(data.train.tensors[1])
    assert found.test.tensors[0].equal(data.held_out.tensors[0])


def test_a_folder_with_too_little_is_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist", train=5000, test=7)
    with pytest.raises(InvalidData, match="must hold more than 5000 training images, got 5000"):
        splits.mnist(str(tmp_path))
    with pytest.raises(InvalidData, match=r"input.txt does not exist: put the text there"):
        splits.shakespeare(str(tmp_path))


def test_the_text_is_cut_at_90_and_95_percent(tmp_path: Path) -> None:
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text("ab" * 1800 + "c" * 200 + "d" * 200)
    train, val, test = splits.shakespeare(str(tmp_path))
    assert [set(part.tensors[0].unique().tolist()) for part in (train, val, test)] == [{0, 1}, {2}, {3}]
    assert [len(part) for part in (train, val, test)] == [221, 3, 3]  # (3600 - 65) // 16 + 1, (200 - 65) // 64 + 1


def test_sequences_are_views_and_targets_are_one_further_on() -> None:
    text = torch.arange(200)
    data = splits.sequences(text, stride=64)
    inputs, targets = data.tensors
    assert inputs[1].tolist() == list(range(64, 128))
    assert targets.equal(inputs + 1)
    assert torch.cat(list(targets)).tolist() == list(range(1, 193))  # each once
    assert inputs.untyped_storage().data_ptr() == targets.untyped_storage().data_ptr() == text.data_ptr()
    assert isinstance(make_source(data, seed=0, chunk_size=2), MemorySource)


def test_evenly_takes_the_first_and_the_last() -> None:
    data = TensorDataset(torch.arange(10), torch.arange(10))
    assert splits.evenly(data, 4).tensors[0].tolist() == [0, 3, 6, 9]
    assert splits.evenly(data, 10) is data


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_a_task_holds_together(task: Task) -> None:
    assert list(task.learning_rates) == list(OPTIMIZERS)
    for low, middle, high in task.learning_rates.values():
        assert middle / low == pytest.approx(math.sqrt(10), rel=0.01)
        assert high / middle == pytest.approx(math.sqrt(10), rel=0.01)
    assert task.sizes == tuple(sorted(task.sizes))
    assert task.base_batch_size == task.sizes[0]
    first, same, other = task.build(1), task.build(1), task.build(2)
    p, q, r = (next(model.parameters()) for model in (first, same, other))
    assert p.equal(q)
    assert not p.equal(r)
    assert isinstance(hash(task), int)


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_a_task_trains_on_its_real_data(task: Task) -> None:
    folder = (
        "" if task.name == "digits" else str(real_data("tinyshakespeare" if task.name == "gpt" else "mnist").parent)
    )
    data = task.data(folder)
    assert data is task.data(folder)
    assert task.budget >= task.sizes[-1] * 40
    model = task.build(0)
    batch = list(data.train[:8])
    task.loss(model, batch).backward()
    assert all(p.grad is not None for p in model.parameters())
    found = task.evaluate(model, TensorDataset(*batch))
    assert found["loss"] == pytest.approx(task.loss(model, batch).item(), rel=1e-5)
    assert found["loss"] < 2 * math.log(65 if task.name == "gpt" else 10)


def test_evaluation_counts_targets_over_ragged_chunks() -> None:
    scores = torch.log(torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.25, 0.75]]))
    data = TensorDataset(scores, torch.tensor([0, 1, 0]))
    task = dataclasses.replace(TASKS["digits"], micro_batch_size=2)
    model = nn.Dropout(0.5)
    found = task.evaluate(model, data)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["loss"] == pytest.approx((math.log(2) + math.log(4 / 3) + math.log(4)) / 3)
    assert model.training


def test_learning_rates_have_round_names() -> None:
    assert around(-1.5) == (0.01, 0.0316, 0.1)
    assert around(-3) == (0.000316, 0.001, 0.00316)


def test_direction() -> None:
    assert TASKS["cnn"].higher_is_better
    assert not TASKS["gpt"].higher_is_better
