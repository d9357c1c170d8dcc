"""What the command line builds where nothing is said: the recommended choice, the paper's, and bounds of averages."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import adadagrad as ada
from adadagrad.cli.building import make_engine
from adadagrad.cli.config import BatchOptions, MeasureOptions, OptimizerOptions, Settings
from adadagrad.cli.data import load_data

pytest.importorskip("sklearn")


def build(policy: str = "recommended", **options: Any) -> Any:
    batch = {key: options.pop(key) for key in list(options) if key in BatchOptions.__dataclass_fields__}
    measure = {key: options.pop(key) for key in list(options) if key in MeasureOptions.__dataclass_fields__}
    settings = Settings(
        batch=BatchOptions(policy=policy, global_batch_size=16, **batch),
        measure=MeasureOptions(**measure),
        optimizer=OptimizerOptions(**options),
    )
    return make_engine(settings, load_data("digits"), None)


def test_the_default_is_the_recommended_choice() -> None:
    engine = build()
    choice = ada.recommended(torch.optim.Adagrad(torch.nn.Linear(1, 1).parameters()), global_batch_size=16)
    assert engine.policy == choice["policy"]
    assert engine.learning_rate.rule == choice["rate"]
    assert engine.bounds == choice["bounds"]
    assert engine.min_batch_size == choice["min_batch_size"]
    assert engine.measuring.settings == choice["measure"]


def test_what_is_given_takes_the_place_of_the_recommended() -> None:
    engine = build(min_batch_size=8, max_growth=3.0, max_overhead=0.01, rate="none", confidence=0.9)
    assert (engine.min_batch_size, engine.bounds.max_growth, engine.bounds.confidence) == (8, 3.0, 0.9)
    assert engine.learning_rate.rule is None
    assert engine.measuring.settings.max_overhead == 0.01


@pytest.mark.parametrize(
    ("policy", "growth", "rule"),
    [
        ("norm", None, None),  # the paper's setting
        ("noise-scale", 1.2, ada.LinearScaling()),
        ("cabs", None, None),  # it takes the batch from the rate
        ("constant", None, None),
    ],
)
def test_the_rate_and_the_growth_of_other_policies(policy: str, growth: float | None, rule: Any) -> None:
    engine = build(policy)
    assert engine.bounds.max_growth == growth
    assert engine.learning_rate.rule == rule
    assert engine.min_batch_size == 1


def test_the_papers_setting() -> None:
    engine = build("norm", rate="none", measure_every=1, max_examples="all", on_infinite="cap")
    assert engine.learning_rate.rule is None
    assert engine.measuring.settings == ada.Measure(every=1, max_examples=None)
    assert engine.bounds == ada.Bounds(on_infinite="cap")  # monotone by the policy
