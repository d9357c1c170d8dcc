from __future__ import annotations

import dataclasses
import math

import pytest

from adadagrad.core.errors import InvalidArgument, UnknownName
from adadagrad.core.reduction import CoordinateReduction
from adadagrad.core.settings import Bounds, Measure

BAD = [
    (Bounds, {"max_growth": 1.0}, r"max_growth must be > 1 \(or None for no limit\), got 1.0"),
    (Bounds, {"max_growth": 0.5}, "max_growth must be > 1"),
    (Bounds, {"max_growth": -2.0}, "max_growth must be > 0"),
    (Bounds, {"max_growth": math.nan}, "max_growth must be > 0"),
    (Bounds, {"max_growth": math.inf}, "max_growth must be > 0"),
    (Bounds, {"multiple_of": 0}, "multiple_of must be >= 1, got 0"),
    (Bounds, {"multiple_of": 2.0}, "multiple_of must be an integer"),
    (Bounds, {"on_infinite": "caps"}, "unknown on_infinite 'caps': did you mean cap"),
    (Bounds, {"confidence": 0.5}, "confidence must be > 0.5 and < 1, for example 0.9, got 0.5"),
    (Bounds, {"confidence": 1.0}, "confidence must be > 0.5 and < 1"),
    (Bounds, {"confidence": 90}, "confidence must be between 0 and 1, got 90"),
    (Bounds, {"confidence": math.nan}, "confidence must be between 0 and 1, got nan"),
    (Bounds, {"confidence": "high"}, "confidence must be between 0 and 1, got 'high'"),
    (Measure, {"every": 0}, "every must be >= 1, got 0"),
    (Measure, {"every": "often"}, "every must be an integer, got 'often'"),
    (Measure, {"every": 1.5}, "every must be an integer"),
    (Measure, {"max_overhead": 0.0}, "max_overhead must be > 0"),
    (Measure, {"max_overhead": 1.5}, "max_overhead must be between 0 and 1"),
    (Measure, {"max_overhead": math.nan}, "max_overhead must be > 0"),
    (Measure, {"max_examples": 1}, "max_examples must be >= 2, got 1"),
    (Measure, {"max_examples": 8.0}, "max_examples must be an integer"),
    (Measure, {"estimator": "automatic"}, "estimator must be \"auto\" or an estimator such as .* got 'automatic'"),
    (Measure, {"estimator": "probe"}, r"Probe\(\), got 'probe'"),
    (CoordinateReduction, {"kind": "mean"}, "unknown kind 'mean'"),
    (CoordinateReduction, {"kind": "quantile"}, "quantile must be given"),
    (CoordinateReduction, {"kind": "quantile", "quantile": 1.5}, "quantile must be between 0 and 1"),
    (CoordinateReduction, {"kind": "max", "quantile": 0.5}, 'quantile belongs to kind="quantile"'),
]


@pytest.mark.parametrize(("cls", "options", "message"), BAD)
def test_bad_settings_are_refused_by_name(cls, options, message):
    with pytest.raises(InvalidArgument, match=message):
        cls(**options)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UnknownName, match="known: cap, hold"):
        Bounds(on_infinite="zzz")


def test_the_papers_bounds():
    assert Bounds.paper() == Bounds(max_growth=None, multiple_of=1, monotone=True, on_infinite="cap")
    assert Bounds().on_infinite == "hold"
    assert Bounds().monotone is None
    assert Bounds().confidence is Bounds.paper().confidence is None


@pytest.mark.parametrize("settings", [Bounds(), Measure(), CoordinateReduction()])
def test_settings_are_frozen_keyword_only_and_hashable(settings):
    assert eval(repr(settings), {type(settings).__name__: type(settings)}) == settings
    hash(settings)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(settings, dataclasses.fields(settings)[0].name, 1)
    with pytest.raises(TypeError):
        type(settings)(1)


def test_what_the_design_promises_by_default():
    assert (Measure().estimator, Measure().every, Measure().max_overhead) == ("auto", "auto", 0.05)
