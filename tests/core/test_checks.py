from __future__ import annotations

import functools
import math

import pytest
import torch

from adadagrad.core import errors
from adadagrad.core.checks import check_at_least, check_choice, check_fraction, check_integer, check_positive
from adadagrad.core.errors import AdadagradError, InvalidArgument, MissingExtra, UnknownName

NO_NUMBERS = [math.nan, "1", None, True, [1], 1j]


@pytest.mark.parametrize("bad", [0, 0.0, -1, -0.5, math.inf, -math.inf, *NO_NUMBERS])
def test_positive(bad):
    check_positive(eta=1, theta=1e-300)
    with pytest.raises(InvalidArgument, match=r"^eta must be > 0, got "):
        check_positive(theta=1.0, eta=bad)


@pytest.mark.parametrize("bad", [1.9, -3, math.inf, *NO_NUMBERS])
def test_at_least(bad):
    check_at_least(2, size=2, other=2.5)
    with pytest.raises(InvalidArgument, match=r"^size must be >= 2, got "):
        check_at_least(2, size=bad)


@pytest.mark.parametrize("bad", [-0.01, 1.01, math.inf, *NO_NUMBERS])
def test_fraction(bad):
    check_fraction(q=0, r=1.0, s=0.5)
    with pytest.raises(InvalidArgument, match=r"^q must be between 0 and 1, got "):
        check_fraction(q=bad)


@pytest.mark.parametrize("bad", [1.0, *NO_NUMBERS])
def test_integer(bad):
    check_integer(1, n=1, m=10**30)
    with pytest.raises(InvalidArgument, match=r"^n must be an integer, got "):
        check_integer(1, n=bad)
    with pytest.raises(InvalidArgument, match=r"^n must be >= 1, got 0$"):
        check_integer(1, n=0)


class Foreign:
    """A number as NumPy and torch have them, which JSON and records do not take."""

    def __float__(self):
        return 4.0

    def __repr__(self):
        return "Foreign(4)"


@pytest.mark.parametrize("bad", [Foreign(), torch.tensor(4)])
def test_a_number_of_another_library_is_refused_with_what_to_write(bad):
    for check in (check_positive, functools.partial(check_at_least, 1), check_fraction):
        with pytest.raises(InvalidArgument, match=r"^n must be .*, got .*\(4\): write float\(\.\.\.\) around it$"):
            check(n=bad)
    with pytest.raises(InvalidArgument, match=r"^n must be an integer, got .*\(4\): write int\(\.\.\.\) around it$"):
        check_integer(1, n=bad)


def test_a_whole_float_is_refused_with_what_to_write():
    with pytest.raises(InvalidArgument, match=r"^n must be an integer, got 64.0: write int\(\.\.\.\) around it$"):
        check_integer(1, n=64.0)
    with pytest.raises(InvalidArgument, match=r"^n must be an integer, got 64.5$"):
        check_integer(1, n=64.5)


def test_choice_suggests_the_nearest():
    check_choice("mode", "skip", ("skip", "stop"))
    with pytest.raises(UnknownName, match=r"unknown mode 'skap': did you mean skip.*known: skip, stop"):
        check_choice("mode", "skap", ("skip", "stop"))
    with pytest.raises(UnknownName, match=r"^unknown mode 'zzz': known: skip, stop$"):
        check_choice("mode", "zzz", ("stop", "skip"))


def test_every_error_is_ours_and_bad_arguments_are_value_errors():
    found = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(found) > 10
    assert all(issubclass(e, AdadagradError) and e.__doc__ for e in found)
    for error in (InvalidArgument, UnknownName, errors.EmptyDataset, errors.UnsizedDataset, errors.OverriddenSampler):
        assert issubclass(error, ValueError)


def test_a_missing_extra_says_what_to_install():
    assert str(MissingExtra("matplotlib", "report")) == ("matplotlib is not installed: pip install 'adadagrad[report]'")
    assert issubclass(MissingExtra, ImportError)
