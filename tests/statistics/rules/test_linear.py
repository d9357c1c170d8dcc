"""Linear layers: the cheaper of the two products is formed, and both give the norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adadagrad.statistics.rules.linear import LinearRule
from tests.statistics.checking import floats

N = 6


@pytest.mark.parametrize(
    ("positions", "inputs", "outputs", "gram"),
    [(3, 40, 30, True), (9, 4, 3, False), (2, 4, 4, False), (2, 5, 4, True), (2, 4, 5, True), (3, 4, 5, False)],
)
def test_the_product_with_fewer_flops_is_formed(
    positions: int, inputs: int, outputs: int, gram: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gram iff T (p + d) < p d: 2 T^2 (p + d) flop against 2 T p d."""
    layer, x, gy = nn.Linear(inputs, outputs).double(), floats(N, positions, inputs), floats(N, positions, outputs)
    formed, bmm = [], torch.bmm

    def watched(a, b):
        formed.append((a.shape[1], b.shape[2]))
        return bmm(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "bmm", watched)
        norms = LinearRule().square_norms(layer, x, gy, {"weight"})
    assert formed == ([(positions, positions)] * 2 if gram else [(outputs, inputs)])
    torch.testing.assert_close(norms, bmm(gy.mT, x).square().sum((1, 2)), rtol=1e-12, atol=0)
