"""The same images in other wrappings give the same perturbation, and the seed alone decides on the order."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from adadagrad.apps.universal_perturbation import Perturbation, find_universal_perturbation
from tests.apps.universal_perturbation.cases import Watched, network, some_images

IMAGES = some_images()
MODEL = network()


class Pairs(Dataset[Any]):
    """Images beside anything."""

    def __init__(self, images: Tensor, beside: Any = None) -> None:
        self.images, self.beside = images, beside

    def __getitem__(self, index: int) -> Any:
        return self.images[index], index if self.beside is None else self.beside

    def __len__(self) -> int:
        return len(self.images)


class Alone(Pairs):
    def __getitem__(self, index: int) -> Any:
        return self.images[index]


class Augmented(Pairs):
    """Random numbers of all kinds in each example."""

    def __getitem__(self, index: int) -> Any:
        factor = 0.8 + 0.1 * torch.rand(()).item() + 0.1 * random.random()
        return self.images[index] * factor, 0


def collate_bright(examples: list[Any]) -> Any:
    return torch.stack([image for image, _ in examples]) * 0.5 + 0.5, None


def find(data: Any, **settings: Any) -> Perturbation:
    settings = {"epochs": 3, "large_batch": 10, "small_batch": 4} | settings
    return find_universal_perturbation(MODEL, data, 0.2, **settings)


@pytest.mark.parametrize(
    "data",
    [
        TensorDataset(IMAGES),
        TensorDataset(IMAGES, torch.arange(24)),
        Pairs(IMAGES),
        Pairs(IMAGES, "a word"),
        Alone(IMAGES),
        [(image, 0) for image in IMAGES],
        Subset(Pairs(torch.cat([IMAGES, 1 - IMAGES])), range(24)),
        DataLoader(Pairs(IMAGES), batch_size=5),
        DataLoader(TensorDataset(IMAGES, torch.arange(24)), batch_size=7, shuffle=True, drop_last=True),
    ],
    ids=["tensors", "labelled", "pairs", "words", "alone", "list", "subset", "loader", "shuffled loader"],
)
def test_every_wrapping_gives_the_same_perturbation(data: Any) -> None:
    assert torch.equal(find(data).delta, find(IMAGES).delta)


def test_labels_have_no_part_in_it() -> None:
    """What is left is the model's own prediction; a data set whose labels are wrong changes nothing."""
    wrong = TensorDataset(IMAGES, (network()(IMAGES).argmax(1) + 1) % 3)
    right = TensorDataset(IMAGES, network()(IMAGES).argmax(1))
    assert torch.equal(find(wrong).delta, find(right).delta)


def test_a_loaders_collate_function_is_used() -> None:
    bright = find(DataLoader(Pairs(IMAGES), collate_fn=collate_bright))
    torch.testing.assert_close(bright.delta, find(IMAGES * 0.5 + 0.5).delta)
    assert not torch.equal(bright.delta, find(IMAGES).delta)
    plain = DataLoader(TensorDataset(IMAGES, torch.arange(24)), collate_fn=collate_bright)
    assert torch.equal(find(plain).delta, bright.delta)


def test_augmentation_is_seeded_and_the_programs_random_state_is_left_alone() -> None:
    torch.manual_seed(7)
    random.seed(7)
    state, python = torch.get_rng_state(), random.getstate()
    first = find(Augmented(IMAGES))
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    torch.manual_seed(8)
    random.seed(9)
    assert torch.equal(find(Augmented(IMAGES)).delta, first.delta)
    model = Watched(network())
    find_universal_perturbation(model, Augmented(IMAGES[:1]), 0.0, method="spgd", epochs=2)
    assert not torch.equal(model.batches[0], model.batches[1])  # anew in every epoch
    find_universal_perturbation(model, Augmented(IMAGES[:1]), 0.0, method="spgd", epochs=1, seed=1)
    assert not torch.equal(model.batches[0], model.batches[2])  # and for every seed


def test_the_seed_decides_on_order_and_draws() -> None:
    for method in ("sga", "spgd", "aggregation", "random"):
        one, again, other = (find(IMAGES, method=method, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(one.delta, again.delta)
        assert not torch.equal(one.delta, other.delta)
        assert (one.seed, other.seed) == (1, 2)


def test_the_random_perturbation_is_signs_of_both_kinds() -> None:
    found = find(IMAGES.float(), method="random")
    assert found.delta.unique().tolist() == pytest.approx([-0.2, 0.2])
    assert abs(float(found.delta.mean())) < 0.15
    assert (found.gradient_count, found.epochs, dict(found.settings)) == (0, 0, {})


def test_one_image_is_enough_and_batches_may_be_larger_than_the_data() -> None:
    found = find_universal_perturbation(network(), IMAGES[:1], 0.2, epochs=2)
    assert found.gradient_count == 2 * 1  # floor(4 * 1 / 10) is 0: one draw of the one image
    found = find_universal_perturbation(network(), IMAGES[:3], 0.2, k=10, epochs=1)
    assert found.gradient_count == 3 * 3


def test_images_and_model_may_differ_in_precision() -> None:
    """Float64 images on a float32 model and the other way round; a half-precision model is searched in float32."""
    assert find_universal_perturbation(network(dtype=torch.float32), IMAGES, 0.2, epochs=1).delta.dtype == torch.float32
    assert find_universal_perturbation(network(), IMAGES.float(), 0.2, epochs=1).delta.dtype == torch.float64
    half = find_universal_perturbation(network(dtype=torch.bfloat16), IMAGES.bfloat16(), 0.2, epochs=1)
    assert half.delta.dtype == torch.float32
    assert 0 < half.linf_norm <= 0.2


def test_a_model_without_parameters_computes_where_the_images_are() -> None:
    model = torch.nn.Flatten().eval()
    found = find_universal_perturbation(model, IMAGES.float(), 0.2, epochs=1)
    assert found.delta.device.type == "cpu"
    assert found.linf_norm > 0


def test_inside_no_grad_and_inference_mode() -> None:
    expected = find(IMAGES).delta
    with torch.no_grad():
        assert torch.equal(find(IMAGES).delta, expected)
    with torch.inference_mode():
        assert torch.equal(find(IMAGES.clone()).delta, expected)
