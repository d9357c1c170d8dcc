"""The singular values that Newton-Schulz iterations leave, as said in their docstring."""

from __future__ import annotations

import pytest
import torch

from adadagrad.optimizers.orthogonal import orthogonalised


@pytest.mark.parametrize(("dtype", "slack"), [(None, 0.0), (torch.bfloat16, 0.02)])
def test_values_are_near_one_down_to_a_share_of_the_norm(dtype: torch.dtype | None, slack: float) -> None:
    values = torch.logspace(-4, 0, 300, dtype=torch.float64)
    share = values / values.norm()
    found = orthogonalised(torch.diag(values), dtype=dtype).diagonal()
    assert float(found[share >= 2e-3].min()) >= 0.68 - slack
    assert float(found.max()) <= 1.21 + slack
    if dtype is None:
        assert float(found[(share - 1e-3).abs().argmin()]) == pytest.approx(0.47, abs=0.02)
        assert float(found[(share - 1e-4).abs().argmin()]) == pytest.approx(0.05, abs=0.01)
