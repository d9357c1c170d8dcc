"""Every argument of the search changes its result, and every mistake is named before any gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

from adadagrad.apps.universal_perturbation import Perturbation, find_universal_perturbation
from adadagrad.apps.universal_perturbation.images import CHUNK
from adadagrad.batching import SampleOrder
from adadagrad.core.errors import EmptyDataset, InvalidArgument, OverriddenSampler, UnknownName, UnsizedDataset
from tests.apps.universal_perturbation.cases import Watched, network, some_images

SGA: dict[str, Any] = {"epochs": 4, "large_batch": 12, "small_batch": 4}


@pytest.mark.parametrize(
    ("name", "value", "others"),
    [
        ("method", "spgd", {}),
        ("method", "aggregation", {}),
        ("method", "random", {}),
        ("step", 0.05, {}),
        ("k", 2, {}),
        ("small_batch", 6, {}),
        ("large_batch", 24, {}),
        ("epochs", 3, {}),
        ("loss", "neg_logit", {}),
        ("beta", 0.5, {}),
        ("momentum", 0.0, {}),
        ("momentum", 0.0, {"method": "spgd"}),
        ("large_batch", 24, {"method": "spgd"}),
        ("beta", 0.5, {"method": "spgd"}),
        ("k", 2, {"method": "aggregation"}),
        ("small_batch", 3, {"method": "aggregation"}),
        ("target", 1, {}),
        ("init", torch.full((1, 5, 5), 0.1), {"epochs": 1}),
        ("seed", 1, {}),
    ],
)
def test_every_argument_counts(name: str, value: Any, others: dict[str, Any]) -> None:
    settings = SGA | others
    plain = find_universal_perturbation(network(), some_images(), 0.2, **settings)
    changed = find_universal_perturbation(network(), some_images(), 0.2, **settings | {name: value})
    assert not torch.equal(plain.delta, changed.delta)


def test_defaults_are_the_published_ones() -> None:
    found = find_universal_perturbation(network(), some_images(8), 10 / 255, epochs=1)
    assert dict(found.settings) == {
        "images": 8,
        "step": pytest.approx(1 / 255),
        "init": "zeros",
        "large_batch": 250,
        "loss": "clamped_ce",
        "momentum": 0.9,
        "k": 4,
        "small_batch": 10,
        "beta": 9.0,
    }
    assert (found.method, found.seed, found.target, found.eps) == ("sga", 0, None, 10 / 255)
    targeted = find_universal_perturbation(network(), some_images(8), 0.1, method="spgd", target=1, epochs=1)
    assert set(targeted.settings) == {"images", "step", "init", "large_batch", "loss", "momentum"}


def test_a_target_needs_no_bound() -> None:
    """Images far from the target pull the more, however large their cross-entropy is."""
    settings: dict[str, Any] = {"target": 1, "epochs": 2}
    one, other = (find_universal_perturbation(network(), some_images(), 0.2, beta=b, **settings) for b in (9.0, 1e-9))
    assert torch.equal(one.delta, other.delta)
    assert one.linf_norm > 0


def test_init_is_continued_from_and_left_alone() -> None:
    init = torch.full((1, 5, 5), 0.2)  # more than 0.2, as a float32
    kept = init.clone()
    found = find_universal_perturbation(network(), some_images(), 0.2, init=init, epochs=1, step=1e-6)
    assert torch.equal(init, kept)
    assert found.linf_norm <= 0.2
    torch.testing.assert_close(found.delta, init.double(), rtol=0, atol=2e-6)
    assert found.settings["init"] == "given"
    first = find_universal_perturbation(network(), some_images(), 0.2, epochs=1)
    assert isinstance(first, Perturbation)
    find_universal_perturbation(network(), some_images(), 0.2, init=first.delta, epochs=1)


BAD_NUMBERS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"eps": -0.1},
        InvalidArgument,
        r"eps must be between 0 and 1, got -0\.1: it is in the units of images in \[0, 1\]",
    ),
    ({"eps": 10}, InvalidArgument, r"eps must be between 0 and 1, got 10: .* such as 8 / 255"),
    ({"eps": float("nan")}, InvalidArgument, "eps must be between 0 and 1, got nan"),
    ({"method": "SGA"}, UnknownName, r"unknown method 'SGA': .*known: aggregation, random, sga, spgd"),
    ({"step": 0.0}, InvalidArgument, r"step must be > 0, got 0\.0"),
    ({"k": 0}, InvalidArgument, "k must be >= 1, got 0"),
    ({"k": 1.5}, InvalidArgument, r"k must be an integer, got 1\.5"),
    ({"small_batch": 0}, InvalidArgument, "small_batch must be >= 1, got 0"),
    ({"large_batch": 0}, InvalidArgument, "large_batch must be >= 1, got 0"),
    ({"large_batch": 5}, InvalidArgument, "small_batch must be <= large_batch, from which it is drawn, got 10 and 5"),
    ({"epochs": 0}, InvalidArgument, "epochs must be >= 1, got 0"),
    ({"loss": "ce"}, UnknownName, "unknown loss 'ce': known: clamped_ce, neg_logit"),
    ({"beta": 0.0}, InvalidArgument, r"beta must be > 0, got 0\.0"),
    ({"momentum": 1.0}, InvalidArgument, r"momentum must be >= 0 and below 1, got 1\.0"),
    ({"target": -1}, InvalidArgument, "target must be >= 0, got -1"),
    ({"target": 3}, InvalidArgument, "target must be < 3, the number of the model's classes, got 3"),
    ({"seed": 0.5}, InvalidArgument, r"seed must be an integer, got 0\.5"),
    ({"init": torch.zeros(5, 5)}, InvalidArgument, r"init must be .* of shape \(1, 5, 5\), got \(5, 5\)"),
    ({"init": torch.full((1, 5, 5), 0.3)}, InvalidArgument, r"init must lie within eps = 0\.2 of 0, .* entry of 0\.3"),
    ({"init": torch.full((1, 5, 5), float("nan"))}, InvalidArgument, "got a largest entry of nan"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD_NUMBERS, ids=[str(i) for i in range(len(BAD_NUMBERS))])
def test_bad_numbers_are_refused_before_any_gradient(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = Watched(network())
    with pytest.raises(error, match=message):
        find_universal_perturbation(model, some_images(), **{"eps": 0.2} | settings)
    assert not model.batches


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield some_images(1)[0]


class Unsized(torch.utils.data.Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return some_images(1)[0]


SPOILT = some_images(600)
SPOILT[599, 0, 2, 2] = -0.25
NAN = some_images(3)
NAN[1, 0, 0, 0] = float("nan")
DATA = TensorDataset(some_images())
BAD_DATA: dict[str, tuple[Any, type[Exception], str]] = {
    "one bad image": (SPOILT, InvalidArgument, r"data must lie in \[0, 1\], got values from -0\.25 to .*normalisation"),
    "0 to 255": (some_images() * 255, InvalidArgument, r"data must lie in \[0, 1\]"),
    "nan": (NAN, InvalidArgument, r"data must lie in \[0, 1\], got values from nan to nan"),
    "bytes": ((some_images() * 255).byte(), InvalidArgument, r"floating point in \[0, 1\], got torch.uint8: divide by"),
    "one image": (some_images()[0], InvalidArgument, r"data must have shape \(n, C, H, W\), got \(1, 5, 5\)"),
    "vectors": (
        TensorDataset(torch.rand(4, 25)),
        InvalidArgument,
        r"data must have shape \(n, C, H, W\), got \(4, 25\)",
    ),
    "no images": (some_images(0), EmptyDataset, "data is empty"),
    "words": ("images/", InvalidArgument, "data must be a tensor .* a Dataset or a DataLoader, got a str"),
    "iterable": (Endless(), UnsizedDataset, r"iterable data set \(Endless\): pass a map-style one"),
    "unsized": (Unsized(), UnsizedDataset, "give Unsized a __len__"),
    "pictures": ([("picture.png", 0)] * 3, InvalidArgument, r"data must be a tensor, got a tuple: .*ToTensor"),
    "objects": ([(object(), 0)] * 3, InvalidArgument, r"could not be collated .* add transforms.ToTensor"),
    "two shapes": ([torch.rand(1, 5, 5), torch.rand(1, 6, 5)], InvalidArgument, "resize all to one shape"),
    "sampler": (
        DataLoader(DATA, sampler=SubsetRandomSampler([1, 2])),
        OverriddenSampler,
        r"sampler of data \(SubsetRandomSampler\) would be replaced .*Subset\(dataset, indices\)",
    ),
    "batch sampler": (
        DataLoader(DATA, batch_sampler=BatchSampler(SubsetRandomSampler([1, 2]), 1, False)),
        OverriddenSampler,
        "SubsetRandomSampler",
    ),
    "replacement": (
        DataLoader(DATA, sampler=torch.utils.data.RandomSampler(DATA, replacement=True)),
        OverriddenSampler,
        "RandomSampler",
    ),
    "a part": (
        DataLoader(DATA, sampler=torch.utils.data.RandomSampler(DATA, num_samples=3)),
        OverriddenSampler,
        "RandomSampler",
    ),
    "no batches": (DataLoader(DATA, batch_size=None), InvalidArgument, "batch_size=None: pass its data set itself"),
}


@pytest.mark.parametrize("method", ["sga", "random"])
@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_images_are_refused_before_any_gradient(name: str, method: str) -> None:
    data, error, message = BAD_DATA[name]
    model = Watched(network())
    with pytest.raises(error, match=message):
        find_universal_perturbation(model, data, 0.2, method=method)
    assert not model.batches


def test_an_image_of_another_shape_is_noticed_also_where_it_is_read_alone() -> None:
    images = list(some_images(CHUNK + 1))
    last = int(SampleOrder(len(images), 0).permutation(0)[-1])
    images[last] = torch.rand(1, 6, 5)
    with pytest.raises(InvalidArgument, match=r"data must have shape \(n, \*\(1, 5, 5\)\) here, got \(1, 1, 6, 5\)"):
        find_universal_perturbation(network(), images, 0.2, method="random")


def test_images_that_leave_their_range_later_are_noticed_when_they_are_read() -> None:
    """Random augmentation may do so in an epoch that was not looked at before."""

    class Brightening(torch.utils.data.Dataset[Any]):
        reads = 0

        def __getitem__(self, index: int) -> Any:
            self.reads += 1
            return some_images(1)[0] + (self.reads > 24), 0

        def __len__(self) -> int:
            return 8

    model = Watched(network())
    with pytest.raises(InvalidArgument, match=r"data must lie in \[0, 1\], got values from 1"):
        find_universal_perturbation(model, Brightening(), 0.2, method="spgd")
    assert len(model.batches) == 2  # the images were read once before that


def test_training_mode_is_refused_also_in_a_part_of_the_model() -> None:
    model = network()
    with pytest.raises(InvalidArgument, match=r"model must be in evaluation mode, got training mode: call \.eval"):
        find_universal_perturbation(model.train(), some_images(), 0.2)
    assert model.training
    model.eval()
    model[1].train()
    with pytest.raises(InvalidArgument, match=r"got training mode in its module 1 \(Tanh\)"):
        find_universal_perturbation(model, some_images(), 0.2)


def test_what_is_no_classifier_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"model must be a torch\.nn\.Module, got a function"):
        find_universal_perturbation(lambda x: x, some_images(), 0.2)  # type: ignore[arg-type]

    class Dictionary(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": x.flatten(1)}

    with pytest.raises(InvalidArgument, match="got a dict: wrap it in a module that returns the logits alone"):
        find_universal_perturbation(Dictionary().eval(), some_images(), 0.2)
    with pytest.raises(InvalidArgument, match=r"got shape \(1, 1, 5, 5\) for 1 images"):
        find_universal_perturbation(nn.Identity().eval(), some_images(), 0.2)
