"""How the site is made: equations as MathML, docstrings and pages as Sphinx reads them. `make site` builds it."""

from __future__ import annotations

import re
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

from docs.make_equations import KINDS, methods, parse

for package in ("sphinx", "furo", "myst_nb"):
    pytest.importorskip(package)
conf = import_module("docs.conf")
mathml = import_module("docs.mathml").mathml


@pytest.mark.parametrize(
    ("latex", "found"),
    [
        (r"V / (\eta^2 s)", r"<msup>.*η.*</msup>"),
        (r"\operatorname{tr} \Sigma", r"<mi>tr</mi>|<mtext>tr|<mi[^>]*>tr"),
        (r"\Big( a \Big)", r"<mo[^>]*>\(</mo>"),
        (r"v \mathrel{+}= q", r"<mo[^>]*>\+</mo>.*<mo[^>]*>=</mo>"),
        (r"a \iff b", "⇔"),
    ],
)
def test_equations_become_elements_that_browsers_show(latex: str, found: str) -> None:
    text = mathml(latex, block=True)
    assert text.startswith("<math")
    assert re.search(found, text, re.DOTALL), text


def test_a_break_of_the_line_becomes_a_table_in_a_block_alone() -> None:
    assert "<mtable" in mathml(r"a &= b \\ c &= d", block=True)
    assert "<mtable" not in mathml("a = b", block=True)


@pytest.mark.parametrize("cls", [cls for kind in KINDS for cls in methods(kind)], ids=lambda cls: cls.__name__)
def test_every_equation_of_a_method_can_be_shown(cls: type) -> None:
    equations = [text for kind, text in parse(cls.__doc__ or "") if kind == "math"]
    assert all(mathml(text, block=True).startswith("<math") for text in equations)


def prepared(docstring: str, what: str = "class") -> list[str]:
    lines = docstring.splitlines()
    handlers: list[tuple[int, Any]] = []
    app: Any = SimpleNamespace(connect=lambda event, do, priority=500: handlers.append((priority, do)))
    conf.setup(app)
    for priority, handler in sorted(handlers, key=lambda pair: pair[0]):
        if priority != 500:
            handler(app, what, "name", None, None, lines)
    return lines


def test_the_bars_of_a_norm_are_no_markup_outside_of_code_and_equations() -> None:
    text = "s is |g|^2, ``|g|``.\n\n.. math:: |a|\n\n    |b|\n\n>>> 1 | 2\nx *= |y|"
    assert prepared(text) == [
        r"s is \|g\|^2, ``|g|``.",
        "",
        ".. math:: |a|",
        "",
        "    |b|",
        "",
        ">>> 1 | 2",
        r"x \*= \|y\|",
    ]


def test_a_source_is_one_paragraph() -> None:
    text = "One.\n\nSource: A (2020),\n    arXiv 1.\nDiffers from the paper: no.\n\nArgs:\n    x: y"
    assert prepared(text)[2:] == [
        "**Source:** A (2020),",
        "arXiv 1.",
        "**Differs from the paper:** no.",
        "",
        "Args:",
        "    x: y",
    ]


def test_what_stands_before_a_colon_in_a_field_is_no_type() -> None:
    assert prepared("Whether it is undone: its gradient is gone.", "property") == [
        "Whether it is undone: its gradient is gone."
    ]
    assert conf._kept == {}


def test_what_github_shows_is_made_readable_for_sphinx() -> None:
    page = ["of $`V_p`$, see [tests/parallel](../tests/parallel) and [this](../tests/a.py)"]
    conf.for_sphinx(SimpleNamespace(), "page", page)  # type: ignore[arg-type]
    assert page == ["of $V_p$, see tests/parallel and [this](../tests/a.py)"]


def test_nothing_is_fetched_to_build_or_to_show() -> None:
    assert not [name for name in conf.extensions if "intersphinx" in name or "mathjax" in name]
    assert conf.html_math_renderer == "mathml"
    assert (conf.nb_execution_mode, conf.nb_execution_raise_on_error) == ("force", True)
