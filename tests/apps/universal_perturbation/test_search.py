"""The search against plain loops, and what is known of it without any."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adadagrad.apps.universal_perturbation import CraftingStep, find_universal_perturbation
from tests.apps.universal_perturbation.cases import SETTINGS, Watched, network, reference, some_images

EPS = 0.2


@pytest.mark.parametrize("name", SETTINGS)
def test_equals_the_algorithm_written_out_image_by_image(name: str) -> None:
    model, images, settings = network(), some_images(), SETTINGS[name] | {"epochs": 3}
    expected, count = reference(model, images, EPS, **settings)
    found = find_universal_perturbation(model, images, EPS, **settings)
    torch.testing.assert_close(found.delta, expected, rtol=0, atol=1e-15)
    assert found.gradient_count == count
    assert 0 < found.linf_norm <= EPS


@pytest.mark.parametrize("large_batch", [24, 10], ids=["whole", "short last batch"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("loss", ["clamped_ce", "neg_logit"])
def test_one_small_batch_of_the_whole_batch_is_spgd(loss: str, momentum: float, large_batch: int) -> None:
    """The walk has one step, which is thrown away. Float64, 3 epochs, difference 0."""
    settings: dict[str, Any] = {"large_batch": large_batch, "epochs": 3, "loss": loss, "momentum": momentum}
    sga = find_universal_perturbation(
        network(), some_images(), EPS, method="sga", k=1, small_batch=large_batch, **settings
    )
    spgd = find_universal_perturbation(network(), some_images(), EPS, method="spgd", **settings)
    assert torch.equal(sga.delta, spgd.delta)
    assert sga.gradient_count == spgd.gradient_count == 3 * 24


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("k", "small_batch"), [(1, 3), (2, 5), (4, 10)])
@pytest.mark.parametrize("method", ["sga", "spgd", "aggregation"])
def test_a_linear_model_is_left_along_its_weights(method: str, k: int, small_batch: int, momentum: float) -> None:
    """The gradient is -w of the predicted class everywhere, so delta = -eps sign(w) after ten steps."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 3)).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(3, 25, generator=generator, dtype=torch.float64))
        model[1].bias.copy_(torch.tensor([0.0, 1e3, 0.0]))  # every image is of class 1
    images = 0.3 + 0.4 * some_images(20)  # away from 0 and 1 by more than eps
    found = find_universal_perturbation(
        model,
        images,
        EPS,
        method=method,
        k=k,
        small_batch=small_batch,
        large_batch=10,
        epochs=6,
        loss="neg_logit",
        momentum=momentum,
    )
    expected = -EPS * model[1].weight.detach()[1].sign().view(1, 5, 5)
    torch.testing.assert_close(found.delta, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["sga", "spgd", "aggregation", "random"])
def test_delta_never_leaves_the_ball_and_images_never_leave_their_range(method: str, dtype: torch.dtype) -> None:
    """0.1 as a float32 is more than 0.1, and that counts too."""
    model, steps = Watched(network(dtype=dtype)), list[CraftingStep]()
    images = some_images(dtype=dtype).round(decimals=1).clamp(0, 1)
    images[:, :, 0] = 0.0
    images[:, :, 1] = 1.0
    found = find_universal_perturbation(
        model, images, 0.1, method=method, step=0.04, epochs=4, large_batch=12, progress=steps.append
    )
    assert found.linf_norm <= 0.1
    assert all(float(step.delta.abs().max()) <= 0.1 for step in steps)
    assert all(float(batch.min()) >= 0 and float(batch.max()) <= 1 for batch in model.batches)
    assert len(steps) == (0 if method == "random" else 8)
    if method != "random":
        assert float(torch.cat(model.batches).min()) == 0.0  # pushed down where there is no room
        assert found.linf_norm == pytest.approx(0.1, rel=1e-6)


def test_radius_zero_is_allowed_and_finds_nothing() -> None:
    for method in ("sga", "spgd", "aggregation", "random"):
        found = find_universal_perturbation(network(), some_images(), 0.0, method=method, epochs=1)
        assert torch.equal(found.delta.abs(), torch.zeros(1, 5, 5, dtype=found.delta.dtype))
        assert found.eps == 0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_images_beyond_the_bound_pull_at_nothing(momentum: float) -> None:
    """With a bound below every cross-entropy the gradient is 0, and its sign too."""
    init = torch.full((1, 5, 5), 0.05, dtype=torch.float64)
    settings: dict[str, Any] = {"init": init, "epochs": 2, "momentum": momentum}
    still = find_universal_perturbation(network(), some_images(), EPS, beta=1e-9, **settings)
    assert torch.equal(still.delta, init)
    moved = find_universal_perturbation(network(), some_images(), EPS, beta=9.0, **settings)
    assert not torch.equal(moved.delta, init)


class Scaled(nn.Module):
    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.factor * self.model(x)
        return output


@pytest.mark.parametrize("method", ["sga", "spgd", "aggregation"])
def test_the_scale_of_the_loss_does_not_matter(method: str) -> None:
    """Logits times 7 are the logit loss times 7; the momentum divides by the norm."""
    settings: dict[str, Any] = {"method": method, "loss": "neg_logit", "epochs": 4, "large_batch": 8, "small_batch": 4}
    plain = find_universal_perturbation(network(), some_images(), EPS, **settings)
    scaled = find_universal_perturbation(Scaled(network(), 7.0).eval(), some_images(), EPS, **settings)
    assert torch.equal(plain.delta, scaled.delta)
    off = find_universal_perturbation(network(), some_images(), EPS, momentum=0.0, **settings)
    assert not torch.equal(plain.delta, off.delta)


def test_gradients_are_counted_exactly_and_the_equal_cost_of_spgd_is_k_times_the_epochs() -> None:
    for settings in (
        {"method": "sga", "k": 4, "small_batch": 10, "large_batch": 20, "epochs": 3},
        {"method": "aggregation", "k": 4, "small_batch": 10, "large_batch": 20, "epochs": 3},
        {"method": "spgd", "large_batch": 20, "epochs": 12},
    ):
        model = Watched(network())
        found = find_universal_perturbation(model, some_images(40), EPS, **settings)  # type: ignore[arg-type]
        assert found.gradient_count == sum(map(len, model.batches)) == 480
    model = Watched(network())
    found = find_universal_perturbation(model, some_images(24), EPS, k=3, small_batch=10, large_batch=20, epochs=2)
    # 20 images: 6 draws of 10; 4 images: floor(1.2) = 1 draw of all 4
    assert [len(batch) for batch in model.batches] == 2 * [10, 10, 10, 10, 10, 10, 4]
    assert found.gradient_count == 128


def test_small_batches_are_independent_draws_without_replacement() -> None:
    """Not a partition: two halves of a batch share images; within one, each image is there once."""
    model = Watched(network())
    images = some_images(20)
    find_universal_perturbation(
        model, images, EPS, method="aggregation", k=10, small_batch=10, large_batch=20, epochs=1
    )
    drawn = [{images.sum((1, 2, 3)).sub(x.sum()).abs().argmin().item() for x in batch} for batch in model.batches]
    assert len(drawn) == 20
    assert all(len(rows) == 10 for rows in drawn)
    assert any(a & b for a, b in zip(drawn[::2], drawn[1::2], strict=True))
    assert len(set.union(*drawn)) == 20


@pytest.mark.parametrize("method", ["sga", "spgd", "aggregation"])
def test_a_pixel_that_is_cut_off_in_all_images_stays_where_it_is(method: str) -> None:
    """Where x + delta lies outside [0, 1] there is no gradient."""
    images = some_images()
    images[:, :, 0], images[:, :, 1] = 0.0, 1.0
    init = torch.zeros(1, 5, 5)
    init[:, 0], init[:, 1] = -0.05, 0.05
    found = find_universal_perturbation(network(), images, EPS, method=method, init=init, epochs=5)
    torch.testing.assert_close(found.delta[:, :2], init[:, :2].double())
    assert float(found.delta[:, 2:].abs().min()) > 0


def test_the_walk_starts_anew_at_every_outer_step() -> None:
    """The first small batch of each outer step sees the true delta, the second one step further."""
    model, steps = Watched(nn.Sequential(nn.Flatten(), nn.Linear(25, 3)).double()), list[CraftingStep]()
    images = torch.full((4, 1, 5, 5), 0.5, dtype=torch.float64)
    find_universal_perturbation(
        model, images, EPS, step=0.01, k=3, small_batch=2, large_batch=4, epochs=2, progress=steps.append
    )
    seen = [float((batch[0] - 0.5).abs().max()) for batch in model.batches]
    assert seen[:6] == pytest.approx([0.0, 0.01, 0.02, 0.03, 0.04, 0.05])
    assert seen[6:8] == pytest.approx([0.01, 0.02])
    assert float(steps[0].delta.abs().max()) == pytest.approx(0.01)


def test_it_raises_the_loss_and_a_target_draws_predictions_to_it() -> None:
    model, images = network(), some_images(200)
    before = model(images).argmax(1)
    losses: list[float] = []
    find_universal_perturbation(
        model, images, EPS, method="spgd", epochs=8, progress=lambda step: losses.append(step.loss)
    )
    assert losses[-1] > 1.05 * losses[0]  # the first is that of clean images
    found = find_universal_perturbation(model, images, EPS, epochs=8)
    assert float((model(found.apply(images)).argmax(1) != before).double().mean()) > 0.2
    for target in range(3):
        found = find_universal_perturbation(model, images, EPS, epochs=8, target=target)
        share = float((model(found.apply(images)).argmax(1) == target).double().mean())
        assert share > float((before == target).double().mean())
        assert found.target == target
