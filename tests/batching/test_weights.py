from __future__ import annotations

import collections
import types

import pytest
import torch

from adadagrad.batching import leading_size
from adadagrad.batching.leaves import join_batches, slice_batch
from adadagrad.core.errors import BatchShapeError
from tests.batching.cases import nested


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(5),
        [torch.ones(5, 2), torch.ones(5)],
        {"x": torch.ones(5), "names": list("abcde"), "kind": "train", "none": None},
        nested([(i, None) for i in range(5)]),
        list("abcde"),
    ],
)
def test_all_leaves_agree_on_the_number_of_examples(batch):
    assert leading_size(batch) == 5


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": torch.ones(5), "y": [torch.ones(4)]}, r"batch\['x'\] has 5, batch\['y'\]\[0\] has 4"),
        ({"kind": "train"}, "no tensor at all"),
        ([], "no tensor at all"),
        (torch.tensor(1.0), r"batch \(float32 tensor of shape \(\)\) has no dimension"),
    ],
)
def test_leaves_that_disagree_are_named(batch, message):
    with pytest.raises(BatchShapeError, match=message):
        leading_size(batch)


@pytest.mark.parametrize(
    "make",
    [
        dict,
        collections.OrderedDict,
        collections.UserDict,
        types.MappingProxyType,
        lambda d: collections.ChainMap(d),
    ],
)
def test_any_mapping_comes_back_as_what_it_was(make):
    batch = make({"x": torch.arange(4), "y": torch.arange(4)})
    joined = join_batches([slice_batch(batch, 0, 1), slice_batch(batch, 1, 4)])
    assert type(joined) is type(batch)
    assert all(torch.equal(joined[key], batch[key]) for key in batch)
    assert batch["x"].tolist() == [0, 1, 2, 3]
