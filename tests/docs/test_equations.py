"""The page of equations: up to date, complete, readable as Markdown; and its docstring parser on made-up docstrings."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest

from adadagrad.core.records import Observation
from adadagrad.policies import AbstractPolicy
from docs.make_equations import KINDS, PAGE, equation, main, methods, missing, page, parse, prose

METHODS = [cls for kind in KINDS for cls in methods(kind)]

MADE_UP = r"""Ask for the smallest thing that is not too small.

.. math:: T = \frac{\|g\|^2}{b} \
          + V_p
          \le 1

In code: V_p is `inner_product_variance`, as
in `NormTest`.

Use it first.

.. math::

    a = b

    c = d

with a as above.

Args:
    eta: Largest error, > 0. Source: is a word here.

        A second paragraph.

Raises:
    InvalidArgument: eta <= 0.

Source: Someone (2020), "A Title",
    arXiv 2001.00001, eq. 3. Differs from the
    paper: the sign.

Example:
    >>> 1 + 1
    2
"""


def test_the_page_is_up_to_date() -> None:
    assert page() == PAGE.read_text(encoding="utf-8"), "docs/equations.md is not up to date: run make docs"


def test_every_kind_is_found() -> None:
    listed = {cls.__name__ for cls in METHODS}
    assert {"NormTest", "ConstantBatch", "CosineSchedule", "PerExample", "AdaGradNorm"} <= listed
    assert not {"AbstractPolicy", "AbstractRate", "AbstractEstimator", "GradientMeter"} & listed
    assert len(METHODS) == len(set(METHODS))


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
def test_says_where_it_is_from(cls: type) -> None:
    assert missing(cls.__name__, inspect.getdoc(cls) or "") == []


def test_parts_of_a_docstring() -> None:
    assert parse(MADE_UP) == [
        ("text", "Ask for the smallest thing that is not too small."),
        ("math", "T = \\frac{\\|g\\|^2}{b} \\\n+ V_p\n\\le 1"),
        ("text", "In code: V_p is `inner_product_variance`, as in `NormTest`."),
        ("text", "Use it first."),
        ("math", "a = b"),
        ("math", "c = d"),
        ("text", "with a as above."),
        ("Args", "eta: Largest error, > 0. Source: is a word here. A second paragraph."),
        ("Raises", "InvalidArgument: eta <= 0."),
        ("Source", 'Someone (2020), "A Title", arXiv 2001.00001, eq. 3.'),
        ("Differs", "Differs from the paper: the sign."),
        ("Example", ">>> 1 + 1 2"),
    ]


@pytest.mark.parametrize("between", ["\n", "\n\n", " ", "\n    "])
def test_differs_is_found_wherever_it_stands_in_a_source(between: str) -> None:
    parts = parse(f"One.\n\nSource: A (2020).{between}Differs from A et al. (2020): no.\n\nMore.")
    assert parts[1:] == [
        ("Source", "A (2020)."),
        ("Differs", "Differs from A et al. (2020): no."),
        ("text", "More."),
    ]


def test_nothing_is_missing_in_a_whole_docstring() -> None:
    assert missing("MadeUp", MADE_UP) == []
    assert missing("MadeUp", "One.\n\nSource: none needed.\n\nExample:\n    >>> 1\n    1") == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("Source: Someone", "Someone", "MadeUp has no Source"),
        ('Someone (2020), "A Title",\n    arXiv 2001.00001, eq. 3. ', "", "MadeUp has no Source"),
        ("Differs from the\n    paper: the sign.", "", "MadeUp has no Differs"),
        ("Differs from the\n    paper: the sign.", "Differs in the sign.", "MadeUp has no Differs"),
        ("Example:", "For example", "MadeUp has no Example"),
    ],
)
def test_what_is_missing_is_said_with_the_name(old: str, new: str, said: str) -> None:
    assert old in MADE_UP
    assert any(fault.startswith(said) for fault in missing("MadeUp", MADE_UP.replace(old, new)))


def test_a_class_that_is_made_public_is_found_and_its_lack_of_a_source_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Unsourced(AbstractPolicy):
        """Ask for one example."""

        needs: ClassVar[frozenset[str]] = frozenset()

        def required_batch_size(self, observation: Observation) -> float:
            return 1.0

    package = ModuleType("made_up_policies")
    package.__dict__.update(
        __all__=["AbstractPolicy", "Unsourced", "Observation", "number"],
        AbstractPolicy=AbstractPolicy,
        Unsourced=Unsourced,
        Observation=Observation,
        number=1,
    )
    monkeypatch.setitem(sys.modules, package.__name__, package)
    assert methods(replace(KINDS[0], package=package.__name__)) == [Unsourced]
    assert missing(Unsourced.__name__, inspect.getdoc(Unsourced) or "")[0].startswith("Unsourced has no Source")


def test_no_docstring_lacks_everything() -> None:
    assert [fault.split(":")[0] for fault in missing("Bare", "")] == [
        "Bare has no Source",
        "Bare has no Differs",
        "Bare has no Example",
    ]


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("as `NormTest` and `eta`", "as [`NormTest`](#normtest) and `eta`"),
        ("``a_b * c`` and :class:`~torch.nn.Linear`", "`a_b * c` and `torch.nn.Linear`"),
        (r"of :math:`\|g_i\|^2`", r"of $`\|g_i\|^2`$"),
        ("<g_i, g> of V_p, *only* 2*b*c", r"\<g_i, g> of V_p, *only* 2\*b\*c"),
        ("_w of x_ at $1", r"\_w of x\_ at \$1"),
        ("arXiv 2402.11215, eq. 2", "[arXiv 2402.11215](https://arxiv.org/abs/2402.11215), eq. 2"),
    ],
)
def test_prose_in_markdown(text: str, markdown: str) -> None:
    assert prose(text, frozenset({"NormTest"})) == markdown


def test_equations_that_github_shows() -> None:
    assert equation("a_1\n= b") == "```math\na_1\n= b\n```"
    assert equation(r"\operatorname{tr} \operatorname*{Min}") == "```math\n\\mathrm{tr} \\mathrm{Min}\n```"
    assert equation("a &= b \\\\\nc &= d") == "```math\n\\begin{aligned}\na &= b \\\\\nc &= d\n\\end{aligned}\n```"


def test_every_link_leads_somewhere() -> None:
    text = page()
    anchors = {heading.lower().replace(" ", "-") for heading in re.findall(r"^##+ (.+)$", text, re.MULTILINE)}
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert len(targets) > 3 * len(METHODS)
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in anchors
        elif not target.startswith("https://arxiv.org/abs/"):
            assert (PAGE.parent / target).exists(), target


def test_check_writes_nothing_and_fails_where_the_page_is_old(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "equations.md"
    assert main([], path) == 0
    assert main(["--check"], path) == 0
    old = path.read_text(encoding="utf-8").replace("**Source:**", "**From:**", 1)
    path.write_text(old, encoding="utf-8")
    assert main(["--check"], path) == 1
    said = capsys.readouterr().out
    assert "-**From:**" in said
    assert "run make docs" in said
    assert path.read_text(encoding="utf-8") == old


def test_the_page_says_how_it_is_made() -> None:
    assert "python docs/make_equations.py" in page().splitlines()[0]
    assert (PAGE.parent / "make_equations.py").exists()
