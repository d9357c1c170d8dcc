"""The policies on real gradients, against the definitions of the tests written out slowly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from adadagrad.core.records import GradientStatistics, Observation
from adadagrad.policies import (
    CABS,
    AugmentedInnerProductTest,
    BigBatch,
    CoordinateNormTest,
    DiveBatch,
    GradientNoiseScale,
    InnerProductTest,
    NormTest,
)


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


def test_policies_on_a_quadratic() -> None:
    """F_i(x) = |x - a_i|^2 / 2 with the four centres a_i below, at x = (5, 1): V = (4 + 16) / 3, g = (4, 1)."""
    centres = torch.tensor([[0.0, 2.0], [2.0, 2.0], [2.0, -2.0], [0.0, -2.0]], dtype=torch.float64)
    units = torch.tensor([5.0, 1.0], dtype=torch.float64) - centres
    observation = replace(observe(units), global_batch_size=4, lr=0.2, loss=float(units.square().sum(1).mean() / 2))
    assert observation.loss == 11.0  # |x - a_i|^2 = 26, 10, 18, 34
    v, s = 20 / 3, 17.0
    for policy, expected in [
        (GradientNoiseScale(fraction=3.0), 3 * v / (s - v / 4)),
        (CABS(scale=4.0, loss_offset=1.0), 4 * 0.2 * 5 / 10),  # variances 1 and 4 with the denominator 4
        (BigBatch(increment=8), 4),  # 5/3 < 17
        (BigBatch(increment=8, eta=0.3), 12),  # 5/3 > 0.09 * 17
        (DiveBatch(delta=0.5), 0.5 * 4 * (26 + 10 + 18 + 34) / (16**2 + 4**2)),
    ]:
        assert policy.required_batch_size(observation) == pytest.approx(expected, rel=1e-12)


def test_noise_scale_is_that_of_gradients_at_two_batch_sizes() -> None:
    """The estimator of McCandlish et al., with all batches of one example as the small one."""
    units = torch.randn(16, 30, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5
    small, big = float(units.square().sum(1).mean()), float(units.mean(0).square().sum())
    signal = (16 * big - 1 * small) / (16 - 1)
    noise = (small - big) / (1 / 1 - 1 / 16)
    asked = GradientNoiseScale(averaging=None).required_batch_size(observe(units))
    assert asked == pytest.approx(noise / signal, rel=1e-12)


def test_noise_scale_is_the_norm_test_without_the_noise_in_s() -> None:
    """With eta = 1/sqrt(c), and s in place of its estimate of the true norm."""
    observation = observe(torch.randn(16, 30, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 0.5)
    assert observation.gradient is not None
    clean = replace(observation.gradient, grad_norm_sq=observation.gradient.true_grad_norm_sq)
    expected = NormTest(eta=0.5).required_batch_size(Observation(gradient=clean))
    assert GradientNoiseScale(fraction=4.0).required_batch_size(observation) == pytest.approx(expected, rel=1e-12)


def test_divebatch_in_pure_noise_asks_for_delta_of_the_data_set() -> None:
    """In many dimensions sum |g_i|^2 and |sum g_i|^2 are equal, so that D is 1 and N D is N."""
    generator = torch.Generator().manual_seed(5)
    shares = [
        DiveBatch(delta=1.0).required_batch_size(observe(torch.randn(64, 2000, generator=generator))) / 64
        for _ in range(50)
    ]
    assert sum(shares) / 50 == pytest.approx(1.0, abs=0.02)
