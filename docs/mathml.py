"""A Sphinx extension that writes equations as MathML, which browsers show without a script from elsewhere.

The translation is docutils' own; what it does not know of LaTeX and our pages use is said in other words first.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

OTHER_WORDS = (
    (re.compile(r"\\mathrel\{\+\}\s*="), "{+}="),
    (re.compile(r"\\(B|b)ig(?=[(\[|])"), r"\\\1igl"),
    (re.compile(r"\\(B|b)ig(?=[)\]])"), r"\\\1igr"),
    (re.compile(r"\\textstyle"), ""),
    (re.compile(r"\\iff"), r"\\Leftrightarrow"),
    (re.compile(r"\\operatorname\*?"), r"\\mathrm"),
)


def mathml(latex: str, *, block: bool) -> str:
    r"""Translate an equation.

    Args:
        latex: As between dollars.
        block: Whether it stands by itself.

    Returns:
        A ``<math>`` element.

    Example:
        >>> mathml(r"\operatorname{tr} \Sigma", block=False)[:6]
        '<math '
    """
    for pattern, words in OTHER_WORDS:
        latex = pattern.sub(words, latex)
    if block and r"\\" in latex and r"\begin" not in latex:
        latex = f"\\begin{{aligned}}\n{latex}\n\\end{{aligned}}"
    return str(tex2mathml(latex, as_block=block))


def _written(translator: HTML5Translator, node: nodes.math | nodes.math_block, *, block: bool) -> None:
    latex = node.astext()
    try:
        text = mathml(latex, block=block)
    except MathError as error:
        logging.getLogger(__name__).warning("no MathML of %r: %s", latex, error, location=node)
        text = f"<code>{translator.encode(latex)}</code>"
    translator.body.append(f'<div class="math">{text}</div>\n' if block else text)
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Make it a choice for ``html_math_renderer``.

    Args:
        app: The application.

    Returns:
        What Sphinx wants to know of an extension.
    """
    app.add_html_math_renderer(
        "mathml",
        (lambda translator, node: _written(translator, node, block=False), None),
        (lambda translator, node: _written(translator, node, block=True), None),
    )
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
