from __future__ import annotations

import pickle
import random

import numpy
import pytest
import torch

from adadagrad.batching import SeededDataset
from tests.batching.cases import Augmented, Fragile, Numbers, assemble, load, many_workers, noisy

pytestmark = many_workers


def states():
    _, keys, place, *_ = numpy.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), keys.tolist(), place


def rows(batches):
    """Return {index: draws} in the order of delivery, as plain numbers."""
    return [tuple(row) for batch in batches for row in zip(*(leaf.tolist() for leaf in batch), strict=True)]


def test_augmentation_is_the_same_for_any_worker_count_chunk_size_and_resume():
    reference = rows(assemble(load(Augmented(20)), chunk_size=8).take([50]))
    for workers in (0, 2, 4):
        assembler = assemble(load(Augmented(20), workers), chunk_size=3 + workers)
        assert rows(assembler.take([1, 7, 12])) == reference[:20]
        state = assembler.state_dict()
        assembler.source.close()
        resumed = assemble(load(Augmented(20), workers), chunk_size=5)
        resumed.load_state_dict(state)
        assert rows(resumed.take([30])) == reference[20:]
        resumed.source.close()


def test_augmentation_differs_between_examples_epochs_and_seeds():
    stream = rows(assemble(load(Augmented(20))).take([40]))
    other = rows(assemble(load(Augmented(20)), seed=1).take([40]))
    for draw in (1, 2, 3):
        assert len({row[draw] for row in stream + other}) == 80


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_draws_nothing_from_the_training_process(workers):
    before = states()
    assembler = assemble(load(Augmented(20), workers))
    for _ in assembler.take([3, 30]):
        assert states() == before
    assembler.source.close()
    assert states() == before


def test_the_generators_come_back_when_an_example_fails():
    before = states()
    with pytest.raises(OSError, match="lost connection"):
        list(assemble(load(Fragile(4, broken=2))).take([4]))
    assert states() == before


def test_random_collating_is_the_same_for_any_worker_count_and_resume():
    reference = rows(assemble(load(Numbers(20), collate_fn=noisy)).take([50]))
    assert len({draw for _, draw in reference}) == 50
    for workers in (0, 2):
        assembler = assemble(load(Numbers(20), workers, collate_fn=noisy), position=13)
        assert rows(assembler.take([2, 35])) == reference[13:]
        assembler.source.close()


def test_it_pickles_for_workers_that_are_spawned():
    dataset = SeededDataset(Augmented(20), 7, torch.utils.data.default_collate)
    keys = [(0, 3), (1, 3), (0, 4)]
    copy = pickle.loads(pickle.dumps(dataset))
    assert rows([copy[keys]]) == rows([dataset[keys]])
