from __future__ import annotations

import math

import pytest
import torch

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.vectors import ROW, SHORT, inner_product, quick_norm, refuse_sparse, squared_norm


@pytest.fixture(scope="module")
def many():
    """2.4 million float32 elements, in tensors of several shapes."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((1200, 1500), (600_000,), (3,), ())]


def exact(left, right):
    return math.fsum(math.fsum((a.double() * b.double()).flatten().tolist()) for a, b in zip(left, right, strict=True))


def test_float32_tensors_are_added_in_float64(many):
    assert abs(float(squared_norm(many)) - exact(many, many)) <= 1e-9 * exact(many, many)
    wide = [t.double() for t in many]
    assert abs(float(squared_norm(wide)) - exact(wide, wide)) <= 1e-12 * exact(wide, wide)
    other = [t.roll(1).abs() if t.dim() else t for t in many]
    absolute = exact([t.abs() for t in many], other)
    assert abs(float(inner_product(many, other)) - exact(many, other)) <= 1e-12 * absolute
    assert squared_norm(many).dtype == inner_product(many, other).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_squares_that_the_tensors_own_precision_cannot_hold(dtype):
    x = [torch.full((3, 5), 300.0, dtype=dtype)]
    assert float(squared_norm(x)) == pytest.approx(15 * 90000.0, rel=1e-12)
    assert float(inner_product(x, x)) == pytest.approx(15 * 90000.0, rel=1e-12)


@pytest.mark.parametrize("size", [1e-25, 1e-12, 1.0, 1e18, 1e25])
def test_large_tensors_whose_squares_float32_cannot_hold(size):
    x = torch.full((SHORT + ROW + 1,), size)
    assert float(squared_norm([x])) == pytest.approx(len(x) * float(x[0].double()) ** 2, rel=1e-6)
    x[1::2] = 0.0
    x[-1] = 3 * size
    count = (len(x) - 1) // 2 + 9
    assert float(squared_norm([x])) == pytest.approx(count * float(x[0].double()) ** 2, rel=1e-6)


def test_layouts_do_not_matter():
    x = torch.arange(24.0).view(2, 3, 4)
    turned, exact_sum = x.transpose(0, 2), sum(i * i for i in range(24))
    for value in (squared_norm([x]), squared_norm([turned]), inner_product([turned], [turned.contiguous()])):
        assert float(value) == pytest.approx(exact_sum, rel=1e-15)


def test_nothing_has_norm_zero():
    assert float(squared_norm([])) == float(inner_product([], [])) == quick_norm([]) == 0.0


def test_no_graph_is_built():
    x = [torch.ones(3, requires_grad=True)]
    assert not squared_norm(x).requires_grad
    assert not inner_product(x, x).requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_quick_norm_finds_what_is_not_finite(bad):
    x = [torch.ones(5), torch.tensor([1.0, bad]), torch.ones(2)]
    assert not math.isfinite(quick_norm(x))
    assert not math.isfinite(float(squared_norm(x)))


@pytest.mark.parametrize("copies", [1, 100])
def test_quick_norm_of_few_and_of_many_tensors(copies: int):
    x = [torch.full((2, 2), 3.0), torch.full((4,), 4.0)] * copies
    assert quick_norm(x) == pytest.approx(10.0 * math.sqrt(copies), rel=1e-6)


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        inner_product([torch.ones(2)], [torch.ones(2), torch.ones(2)])


@pytest.mark.parametrize("function", [refuse_sparse, lambda t: squared_norm([t]), lambda t: quick_norm([t])])
def test_sparse_is_refused_with_the_remedy(function):
    with pytest.raises(InvalidArgument, match="build the Embedding with sparse=False"):
        function(torch.eye(3).to_sparse())
