"""Resuming in the middle is exact under every policy and every learning-rate rule, and under both together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import adadagrad as ada
from tests.engine.cases import WHOLE, make_data, make_engine, make_model, train

POLICIES: dict[str, Any] = {
    "constant": ada.ConstantBatch(12),
    "norm": ada.NormTest(eta=0.6),
    "augmented": ada.AugmentedInnerProductTest(theta=1.0, nu=2.0),
    "coordinate": ada.CoordinateNormTest(eta=2.0, reduction="quantile", quantile=0.5),
    "noise scale": ada.GradientNoiseScale(fraction=0.2, averaging=0.8),
    "noise scale of each step": ada.GradientNoiseScale(fraction=0.1, averaging=None),
    "cabs": ada.CABS(scale=3.0, averaging=0.8),
    "divebatch": ada.DiveBatch(delta=0.1),
    "big batch": ada.BigBatch(increment=3),
    "adabatch": ada.GeometricBatch.adabatch(8, dataset_size=50, every_epochs=2),
    "smith": ada.StagedBatch.smith(4, [150, 300], factor=2.0, dataset_size=400),
    "seesaw": ada.StagedBatch.seesaw(ada.CosineSchedule(), start=6, total_samples=600),
    "critical batch": ada.StagedBatch.critical_batch(6, {100: 20, 300: 60}),
}
RATES: dict[str, Any] = {
    "none": None,
    "adascale": ada.AdaScale(base_batch_size=4, smoothing=0.9),
    "adascale of the paper": ada.AdaScale(base_batch_size=4, progress_in="samples"),
    "adamscale": ada.AdamScale(base_batch_size=4, smoothing=0.9),
    "accumulator": ada.AccumulatorScale(0.9, base_batch_size=4, smoothing=0.9),
    "linear": ada.LinearScaling(base_batch_size=4),
    "sqrt": ada.SquareRootScaling(base_batch_size=4),
    "legw": ada.LEGW(2.0, base_batch_size=4),
    "seesaw": ada.Seesaw(base_batch_size=4),
}
EVERY = list(RATES) if WHOLE else ["adascale", "accumulator"]
PAIRS = [(policy, rate) for policy in POLICIES for rate in RATES if rate in EVERY or policy == "noise scale"]
"""Every policy with two rules, and every rule with one policy; all pairs where the long forms run."""


def make(policy: str, rate: str) -> Any:
    model = make_model(dropout=0.2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    options: dict[str, Any] = {"global_batch_size": 6} if POLICIES[policy].needs else {}
    return make_engine(
        model,
        optimizer,
        make_data(60),
        POLICIES[policy],
        rate=RATES[rate],
        measure=ada.Measure(every=2, max_examples=8),
        bounds=ada.Bounds(max_growth=1.5),
        lr_schedule=ada.CosineSchedule(warmup_samples=20),
        max_grad_norm=1.0,
        total_samples=400,
        **options,
    )


@pytest.mark.parametrize(("policy", "rate"), PAIRS)
def test_resuming_in_the_middle_is_exact(policy: str, rate: str, tmp_path: Any) -> None:
    torch.manual_seed(3)
    whole = make(policy, rate)
    torch.manual_seed(3)
    expected = train(whole)
    at = len(expected) // 2
    assert at > 2
    torch.manual_seed(3)
    first = make(policy, rate)
    torch.manual_seed(3)
    train(first, steps=at)
    first.save(tmp_path / "state.pt")
    torch.manual_seed(99)
    second = make(policy, rate)
    second.load(tmp_path / "state.pt")
    rest = train(second)
    assert [repr(decision) for decision in rest] == [repr(decision) for decision in expected[at:]]
    assert second.progress == whole.progress
    for p, q in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q)
