"""Write docs/equations.md: the equation, the source and the code of every method, taken from the docstrings.

    python docs/make_equations.py [--check]

With ``--check`` nothing is written, and a page that is not up to date is an error. What is listed is found by class in
the public names of four packages; no method is named here.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from torch.optim import Optimizer

from adadagrad.policies.base import AbstractPolicy
from adadagrad.rates.base import AbstractRate
from adadagrad.statistics.base import AbstractEstimator

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "equations.md"
HEAD = """\
<!-- Generated from the docstrings by `make docs` (python docs/make_equations.py): do not edit this page. -->

# Equations

One entry a method: its equation, what its letters are called in the code, where it comes from and where it differs
from that. This page is generated from the docstrings by `make docs` (`python docs/make_equations.py`): correct a
docstring, not the page. When to use a method, its arguments and an example are in the docstring, behind "Code".
"""
HEADER = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Warns|Note|Source|Examples?):(?:\s+|$)")
DIFFERS = re.compile(r"(?:^|\s)(?=Differs\b[^:]{0,80}:)")
CODE = re.compile(r"(:\w+:`[^`]+`|``.+?``|`[^`]+`)")
MARKUP = re.compile(r"[<$~]|(?<![^\W_])_|_(?![^\W_])|(?<=\w)\*(?=\w)")
"""What Markdown would take for markup outside of code; an underscore between two letters is none."""


@dataclass(frozen=True)
class Kind:
    """A section of the page: which public classes of a package belong to it."""

    title: str
    package: str
    holds: Callable[[type], bool]
    introduction: str


def has_source(cls: type) -> bool:
    """Say whether the docstring has a Source."""
    return any(name == "Source" for name, _ in parse(inspect.getdoc(cls) or ""))


KINDS = (
    Kind(
        "Batch size policies",
        "adadagrad.policies",
        lambda cls: issubclass(cls, AbstractPolicy),
        "Each answers how many examples the next step should average, T or b; the letters of the tests are V, the "
        "variance trace, s = |g|^2 and V_p, the variance of the inner products (see [statistics.md](statistics.md)).",
    ),
    Kind(
        "Learning-rate rules",
        "adadagrad.rates",
        lambda cls: issubclass(cls, AbstractRate),
        "Each answers which factor on the learning rate goes with a batch size.",
    ),
    Kind(
        "Learning-rate schedules",
        "adadagrad.rates",
        lambda cls: cls.__name__.endswith("Schedule"),
        "Each gives a factor on the initial learning rate as a function of the examples seen.",
    ),
    Kind(
        "Estimators",
        "adadagrad.statistics",
        lambda cls: issubclass(cls, AbstractEstimator) or has_source(cls),  # also what works on their statistics
        "Each measures V, s and what else a policy needs; how they do it is told in [statistics.md](statistics.md).",
    ),
    Kind("Optimizers", "adadagrad.optimizers", lambda cls: issubclass(cls, Optimizer), "Each gives the update."),
)


def parse(docstring: str) -> list[tuple[str, str]]:
    """Split a docstring in Google style into its parts, in order.

    An indented paragraph belongs to the part before it, and so does one that begins with "Differs". Of a Source, what
    begins with "Differs ...:" is a part of its own.

    Args:
        docstring: What `inspect.getdoc` gives.

    Returns:
        Pairs of a kind ("text" for a paragraph of prose, "math", or the name of a section) and the text; the lines of
        prose are joined, those of an equation are kept.
    """
    parts: list[tuple[str, list[str]]] = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        lines = paragraph.splitlines()
        if parts and paragraph.startswith((" ", "Differs")):
            parts[-1][1].append("")
        elif lines:
            parts.append(("text", []))
        for line in lines:
            if line.startswith(".. math::"):
                parts.append(("math", [line.removeprefix(".. math::").strip()]))
            elif header := HEADER.match(line):
                parts.append((header[1], [line[header.end() :]]))
            else:
                parts[-1][1].append(line.strip())
    found: list[tuple[str, str]] = []
    for kind, lines in parts:
        text = "\n".join(lines).strip()
        if kind == "math":
            found += [("math", equation.strip()) for equation in text.split("\n\n")]
        elif kind == "Source":
            source, *differs = DIFFERS.split(" ".join(text.split()), maxsplit=1)
            found += [("Source", source), *(("Differs", statement) for statement in differs)]
        elif text or kind != "text":
            found.append((kind, " ".join(text.split())))
    return found


def missing(name: str, docstring: str) -> list[str]:
    """Say what the docstring of a method lacks: a Source, a statement of how it differs from that, an Example."""
    parts = dict(parse(docstring))
    source = parts.get("Source", "")
    faults = []
    if not source:
        faults.append(f'{name} has no Source: say where it is from, or "Source: none needed."')
    if not source.lower().startswith("none needed") and "Differs" not in parts:
        faults.append(f'{name} has no Differs: write "Differs from the paper: ..." or "Differs: no." after its Source')
    if not any(section.startswith("Example") for section in parts):
        faults.append(f"{name} has no Example")
    return faults


def methods(kind: Kind) -> list[type]:
    """Return the public classes of a kind by name, without those that are there to derive from."""
    package = import_module(kind.package)
    classes = [value for name in sorted(package.__all__) if inspect.isclass(value := getattr(package, name))]
    return [cls for cls in classes if kind.holds(cls) and not cls.__name__.startswith("Abstract")]


def prose(text: str, names: frozenset[str]) -> str:
    """Turn prose in reStructuredText into Markdown, with links to the methods named and to arXiv."""
    pieces = CODE.split(text)
    for place, piece in enumerate(pieces):
        if place % 2 == 0:
            escaped = MARKUP.sub(r"\\\g<0>", piece)
            pieces[place] = re.sub(r"arXiv[ :](\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", escaped)
        elif piece.startswith(":math:"):
            pieces[place] = f"${piece.removeprefix(':math:')}$"
        else:
            code = re.sub(r"^:\w+:", "", piece).strip("`").removeprefix("~")
            pieces[place] = f"[`{code}`](#{code.lower()})" if code in names else f"`{code}`"
    return "".join(pieces)


def equation(latex: str) -> str:
    r"""Return a block that GitHub shows as an equation.

    A fence, because between ``$$`` Markdown takes backslashes, underscores and a line that begins with = for its own.
    GitHub forbids ``\operatorname``, and a line break needs an environment.
    """
    latex = latex.replace(r"\operatorname*", r"\operatorname").replace(r"\operatorname", r"\mathrm")
    if r"\\" in latex and r"\begin" not in latex:
        latex = f"\\begin{{aligned}}\n{latex}\n\\end{{aligned}}"
    return f"```math\n{latex}\n```"


def places(cls: type) -> tuple[str, str]:
    """Return links to the code of a method and to its tests, if any: ``cases.py`` and the test named as the module."""
    _, folder, *_, module = cls.__module__.split(".")
    tests = [f"tests/{folder}/cases.py", f"tests/{folder}/test_{module}.py"]
    present = [test for test in tests if (ROOT / test).exists()]
    naming = [test for test in present if re.search(rf"\b{cls.__name__}\b", (ROOT / test).read_text(encoding="utf-8"))]
    links = [f"[{path}](../{path})" for path in [f"{cls.__module__.replace('.', '/')}.py", *naming]]
    return links[0], ", ".join(links[1:])


def entry(cls: type, names: frozenset[str]) -> str:
    """Return a method's part of the page: of the prose, only the sentence at the top and what is beside an equation."""
    parts = parse(inspect.getdoc(cls) or "")
    beside = {place + side for place, (kind, _) in enumerate(parts) if kind == "math" for side in (-1, 1)}
    blocks = [f"### {cls.__name__}"]
    for place, (kind, text) in enumerate(parts):
        if kind == "math":
            blocks.append(equation(text))
        elif kind == "text" and (place == 0 or place in beside or text.startswith("In code:")):
            blocks.append(prose(text, names))
        elif kind == "Source":
            blocks.append(f"**Source:** {prose(text, names)}")
        elif kind == "Differs":
            label, _, statement = text.partition(":")
            blocks.append(f"**{label}:** {prose(statement.strip(), names)}")
    code, tests = places(cls)
    return "\n\n".join([*blocks, f"Code: {code}; test: {tests}" if tests else f"Code: {code}"])


def page() -> str:
    """Return the whole page."""
    listed = [(kind, classes) for kind in KINDS if (classes := methods(kind))]
    names = frozenset(cls.__name__ for _, classes in listed for cls in classes)
    contents, sections = [], []
    for kind, classes in listed:
        links = [f"[{cls.__name__}](#{cls.__name__.lower()})" for cls in classes]
        contents.append(f"- [{kind.title}](#{kind.title.lower().replace(' ', '-')}): {', '.join(links)}")
        rows = [f"| {link} | {' | '.join(places(cls))} |" for link, cls in zip(links, classes, strict=True)]
        table = "\n".join(["| equation | code | test |", "|---|---|---|", *rows])
        sections += [f"## {kind.title}", kind.introduction, table, *(entry(cls, names) for cls in classes)]
    return "\n\n".join([HEAD.strip(), "\n".join(contents), *sections]) + "\n"


def main(arguments: list[str], path: Path = PAGE) -> int:
    """Write the page, or compare it with the file; returns the exit status."""
    new, old = page(), path.read_text(encoding="utf-8") if path.exists() else ""
    if "--check" not in arguments:
        path.write_text(new, encoding="utf-8")
    elif new != old:
        lines = difflib.unified_diff(old.splitlines(), new.splitlines(), "docs/equations.md", "docstrings", lineterm="")
        print(*list(lines)[:40], "docs/equations.md is not up to date: run make docs", sep="\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
