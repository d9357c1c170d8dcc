"""The sampler of stable noise against its characteristic function, a library's quantiles, and its own seeds."""

from __future__ import annotations

import math

import pytest
import torch

from adadagrad.core.errors import InvalidArgument
from adadagrad.federated.stable import sample_alpha_stable

COUNT = 400_000


def draw(alpha: float, scale: float = 0.1, count: int = COUNT, seed: int = 0, **options: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return sample_alpha_stable((count,), alpha, scale, generator=generator, **({"dtype": torch.float64} | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [1, 1.0, 1.3, 1.5, 1.8, 2.0])
@pytest.mark.parametrize("tau", [1.0, 5.0, 10.0, 20.0])
def test_characteristic_function(alpha: float, tau: float) -> None:
    """Within four standard errors of exp(-|c tau|^alpha), and odd: the sine's mean is 0."""
    x = draw(alpha)
    expected = math.exp(-(abs(0.1 * tau) ** alpha))
    spread = math.sqrt((1 + math.exp(-(abs(0.2 * tau) ** alpha))) / 2 - expected**2)
    assert torch.cos(tau * x).mean().item() == pytest.approx(expected, abs=4 * spread / math.sqrt(COUNT))
    assert torch.sin(tau * x).mean().item() == pytest.approx(0.0, abs=4 / math.sqrt(COUNT))


def test_quantiles_of_the_absolute_value() -> None:
    x = draw(1.5).abs()
    assert x.median().item() == pytest.approx(0.0969, abs=0.0006)
    assert x.quantile(0.99).item() == pytest.approx(1.198, abs=0.04)


def test_quantiles_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy comes with scikit-learn")
    for alpha in (1.2, 1.7):
        x = draw(alpha)
        for share in (0.6, 0.9, 0.99):
            theirs = stats.levy_stable.ppf(share, alpha, 0.0, scale=0.1)
            assert (x < theirs).double().mean().item() == pytest.approx(share, abs=4 * math.sqrt(share * 0.4 / COUNT))


def test_alpha_2_has_twice_the_square_of_the_scale_as_variance() -> None:
    x = draw(2.0, scale=0.3)
    assert x.var().item() == pytest.approx(2 * 0.3**2, rel=4 * math.sqrt(2 / COUNT))
    normal = torch.distributions.Normal(0, 0.3 * math.sqrt(2))
    assert (x.abs() < 0.3).double().mean().item() == pytest.approx(
        2 * normal.cdf(torch.tensor(0.3)).item() - 1, abs=3e-3
    )


def test_below_2_the_sample_deviation_grows_with_the_sample() -> None:
    x = draw(1.2)
    assert x.std() > 5 * x[:1000].std()


def test_same_seed_same_numbers() -> None:
    assert torch.equal(draw(1.5, seed=4), draw(1.5, seed=4))
    assert not torch.equal(draw(1.5, seed=4), draw(1.5, seed=5))


def test_scale_and_dtype() -> None:
    assert torch.equal(draw(1.5, scale=0.0), torch.zeros(COUNT, dtype=torch.float64))
    torch.testing.assert_close(draw(1.5, scale=2.0), 20 * draw(1.5, scale=0.1), rtol=1e-12, atol=0)
    narrow = draw(1.01, scale=1e4, dtype=torch.float16)
    assert narrow.dtype == torch.float16
    assert narrow.isfinite().all()
    assert draw(1.5, dtype=None).dtype == torch.get_default_dtype()


def test_torch_s_own_generator_is_used_without_one() -> None:
    torch.manual_seed(1)
    one = sample_alpha_stable((3,), 1.5, 1.0)
    torch.manual_seed(1)
    assert torch.equal(one, sample_alpha_stable((3,), 1.5, 1.0))


@pytest.mark.parametrize("ends", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("alpha", [1.0, 1.1, 1.5, 2.0])
def test_the_ends_of_the_uniform_numbers_are_finite(ends: float, alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.full((2,), ends, dtype=torch.float64))
    assert sample_alpha_stable((2,), alpha, 1.0).isfinite().all()


def test_mistakes() -> None:
    for alpha in (0.0, 2.1, math.nan, "1.5"):
        with pytest.raises(InvalidArgument, match="alpha must be above 0 and at most 2"):
            sample_alpha_stable((1,), alpha, 1.0)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=r"scale must be >= 0, got -1\.0"):
        sample_alpha_stable((1,), 1.5, -1.0)
    with pytest.raises(InvalidArgument, match=r"dtype must be of floating-point numbers, got torch\.int64"):
        sample_alpha_stable((1,), 1.5, 1.0, dtype=torch.int64)
