"""How the documentation site is built: by ``make site``, which is ``sphinx-build -W`` of this folder.

Nothing is fetched: no inventory of another project, and equations become MathML, so that a page needs no script from
elsewhere to show them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

from adadagrad.version import __version__  # noqa: E402  (found only now)

project = "adadagrad"
author = "The adadagrad developers"
project_copyright = author
release = version = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "mathml"]
exclude_patterns = ["_build"]
nitpicky = True
nitpick_ignore_regex = [
    (r"py:obj", r".*"),  # single backticks in docstrings: arguments and fields, beside names that are linked
    (
        r"py:.*",
        r"(torch|nn|dist|Tensor|Dataset|DataLoader|os|pathlib|collections|typing|flwr|lightning|transformers|accelerate)\b.*",
    ),
    (
        r"py:class",  # types of arguments that only the library itself passes
        r"(adadagrad\.)?((statistics|engine|core|optimizers|federated)\.)?([a-z_]+\.)*"
        r"(Request|StepScale|\w+Instrument|LogRow|StepRow|Kept|Switch|TailEstimate|Split|Share|Replay|Prepared|Ranks|Stitch"
        r"|Reduce|OptimizerState|FilterNorm|Collate|Coefficients|MetricRecord|Message|ArrayRecord|Weight|Accelerating)",
    ),
    (r"py:class", r"contextlib\..*"),
    (r"py:.*", r"(optional|Path|PathLike|Any|Callable|Iterable|Iterator|Mapping|Sequence|Generator|Literal|Self)\b.*"),
]
suppress_warnings = ["mystnb.lexer"]

default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_mock_imports = ["flwr", "lightning", "transformers", "accelerate", "tensorboard", "wandb", "mlflow", "trackio"]
napoleon_use_rtype = False

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_fence_as_directive = {"math"}
myst_heading_anchors = 4
myst_dmath_double_inline = True
nb_execution_mode = "force"
nb_execution_timeout = 240
nb_execution_raise_on_error = True
nb_merge_streams = True

html_theme = "furo"
pygments_dark_style = "github-dark"  # the theme's own underlines every import
toc_object_entries_show_parents = "hide"
html_title = "adadagrad"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sourcelink = False
html_theme_options: dict[str, Any] = {
    "light_css_variables": {"color-brand-primary": "#1f5f8b", "color-brand-content": "#1f5f8b"},
    "dark_css_variables": {"color-brand-primary": "#7db8e0", "color-brand-content": "#7db8e0"},
}

IN_CODE_AND_DOLLARS = re.compile(r"\$`([^`\n]+)`\$")
TO_A_FOLDER_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+[\w/-]+/?\)")
SOURCE = re.compile(r"^(Source|Differs[^:]*):")
CODE = re.compile(r"(``.+?``|:\w+:`[^`]+`|`[^`]+`)")
MARKUP = re.compile(r"\||\*(?==)")
FIELDS = ("attribute", "data", "property")
_kept: dict[str, list[str]] = {}


def for_sphinx(app: Sphinx, name: str, text: list[str]) -> None:
    """Turn what GitHub shows and Sphinx does not into what it does: inline equations, links to folders of the source.

    Args:
        app: The application.
        name: The page.
        text: Its Markdown, changed in place.
    """
    text[0] = TO_A_FOLDER_OUTSIDE.sub(r"\1", IN_CODE_AND_DOLLARS.sub(r"$\1$", text[0]))


def before_napoleon(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Prepare a docstring: its bars are of norms, its Source a paragraph, and in a field no colon ends a type.

    Args:
        app: The application.
        what: Kind of the object.
        name: Its name.
        thing: The object.
        options: Of the directive.
        lines: Of its docstring, changed in place.
    """
    source, equation = False, False
    for place, line in enumerate(lines):
        source = bool(SOURCE.match(line)) or (source and line.strip() != "")
        equation = ".. math::" in line or (equation and (line.startswith(" ") or not line))
        if source:
            line = SOURCE.sub(r"**\1:**", line.strip())
        if not equation and not line.lstrip().startswith((">>>", "...", "| ")):
            pieces = CODE.split(line)
            line = "".join(MARKUP.sub(r"\\\g<0>", piece) if i % 2 == 0 else piece for i, piece in enumerate(pieces))
        lines[place] = line
    if what in FIELDS:
        _kept[name] = list(lines)


def after_napoleon(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Give a field its docstring back, of which napoleon takes what stands before a colon for a type.

    Args:
        app: The application.
        what: Kind of the object.
        name: Its name.
        thing: The object.
        options: Of the directive.
        lines: Of its docstring, changed in place.
    """
    if what in FIELDS:
        lines[:] = _kept.pop(name, lines)


def setup(app: Sphinx) -> None:
    """Connect the functions; napoleon has priority 500.

    Args:
        app: The application.
    """
    app.connect("source-read", for_sphinx)
    app.connect("autodoc-process-docstring", before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", after_napoleon, priority=600)
