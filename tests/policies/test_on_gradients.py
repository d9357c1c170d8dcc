"""The policies on real gradients, against the definitions of the tests written out slowly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from adadagrad.core.records import GradientStatistics, Observation
from adadagrad.policies import AugmentedInnerProductTest, CoordinateNormTest, InnerProductTest, NormTest


def observe(units: Tensor) -> Observation:
    """Statistics of per-example gradients (b, d), each straight from its definition."""
    g = units.mean(0)
    statistics = GradientStatistics(
        num_examples=len(units),
        grad_norm_sq=float(g.dot(g)),
        variance_trace=float(units.var(0).sum()),
        inner_product_variance=float((units @ g).var()),
        coordinate_ratio=float((units.var(0) / g.square())[g != 0].max()),
    )
    return Observation(gradient=statistics)


def per_example_gradients(b: int, seed: int = 1) -> tuple[list[Tensor], list[int]]:
    """Gradients (b, d) of the 20-32-32-5 network with tanh at initialisation, and the tensors' sizes."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5)).double()
    centres = 0.3 * torch.randn(5, 20, dtype=torch.float64)
    labels = torch.randint(5, (b,))
    inputs = centres[labels] + torch.randn(b, 20, dtype=torch.float64)
    params = list(model.parameters())
    units = []
    for x, y in zip(inputs, labels, strict=True):
        loss = nn.functional.cross_entropy(model(x[None]), y[None])
        units.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, params)]))
    return units, [param.numel() for param in params]


@pytest.mark.parametrize("b", [8, 64])
def test_pure_noise_asks_for_b_over_eta_squared(b: int) -> None:
    """Where the full gradient is zero, the mean of eta^2 T / b is 1."""
    generator = torch.Generator().manual_seed(1)
    ratios = []
    for _ in range(300):
        observation = observe(torch.randn(b, 500, generator=generator, dtype=torch.float64))
        ratios.append(0.5**2 * NormTest(eta=0.5).required_batch_size(observation) / b)
    assert sum(ratios) / 300 == pytest.approx(1.0, abs=0.02)


def test_orthogonality_is_the_definition() -> None:
    """V - Vp/s, which the policy uses, equals the variance of what is left of g_i across g."""
    units = torch.randn(32, 50, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.3
    g = units.mean(0)
    across = units - (units @ g / g.dot(g))[:, None] * g
    expected = float(across.var(0).sum() / (0.1**2 * g.dot(g)))
    asked = AugmentedInnerProductTest(theta=1e6, nu=0.1).required_batch_size(observe(units))
    assert asked == pytest.approx(expected, rel=1e-12)


def test_inner_product_is_not_layer_by_layer() -> None:
    """The layer-wise sum of the released code is about half of the variance that the test defines."""
    gradients, sizes = per_example_gradients(b=128)
    units = torch.stack(gradients)
    g = units.mean(0)
    s = float(g.dot(g))
    joint = float((units @ g).var()) / (0.9**2 * s**2)
    parts = zip(units.split(sizes, dim=1), g.split(sizes), strict=True)
    layerwise = sum(float((unit @ mean).var()) for unit, mean in parts) / (0.9**2 * s**2)
    asked = InnerProductTest(theta=0.9).required_batch_size(observe(units))
    assert asked == pytest.approx(joint, rel=1e-12)
    assert 0.4 < layerwise / asked < 0.6


def test_literal_coordinate_maximum_asks_for_everything() -> None:
    """Some coordinate of the mean gradient is nearly zero, so the maximum is of no practical use."""
    gradients, _ = per_example_gradients(b=128)
    observation = observe(torch.stack(gradients))
    assert CoordinateNormTest(eta=0.5).required_batch_size(observation) > 1e8
    assert NormTest(eta=0.5).required_batch_size(observation) < 1e3
