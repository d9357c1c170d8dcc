"""The documentation's pages as the tests see them: their blocks of code, links and headings.

A comment right above a block changes what the tests do with it:

    <!-- not run: why -->            the block stays as it is
    <!-- tests add: --rounds 3 -->   the commands of the block get these arguments, so that they take seconds
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md") if "_build" not in path.parts)

FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|:{3,})(?P<info>[^`\n]*)$")
COMMENT = re.compile(r"<!-- (?P<what>not run|tests add): (?P<text>.+?) -->")
PYTHON = ("python", "{code-cell} python", "{code-cell} ipython3", "{code-cell}")
SHELL = ("bash", "console")
SHOWN = ("text", "diff", "json", "toml", "math")
"""What is shown and not run; a directive of the site, with its name in braces, is neither."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Args:
        page: The page, below docs/.
        line: Its first line, from 1.
        language: What stands behind the fence.
        text: Its content.
        not_run: Why the tests leave it alone; empty where they do not.
        added: Arguments that the tests add to its commands.
    """

    page: str
    line: int
    language: str
    text: str
    not_run: str = ""
    added: tuple[str, ...] = ()

    @property
    def commands(self) -> list[list[str]]:
        """Arguments of every ``adadagrad`` that a shell block calls."""
        if self.language not in SHELL:
            return []
        joined = self.text.replace("\\\n", " ")
        lines = [shlex.split(line.removeprefix("$ "), comments=True) for line in joined.splitlines()]
        lines = [words[2:] if words[:2] == ["python", "-m"] else words for words in lines]
        return [[*words[1:], *self.added] for words in lines if words[:1] == ["adadagrad"]]


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page, in order; one within another belongs to the outer one."""
    lines, place = read(page).splitlines(), 0
    remark: dict[str, str] = {}
    while place < len(lines):
        line = lines[place]
        if found := COMMENT.search(line):
            remark = {found["what"]: found["text"]}
        elif fence := FENCE.match(line):
            end = next(i for i in range(place + 1, len(lines)) if lines[i].strip() == fence["fence"])
            text = "\n".join(content.removeprefix(fence["indent"]) for content in lines[place + 1 : end])
            added = tuple(shlex.split(remark.get("tests add", "")))
            yield Block(page, place + 1, fence["info"].strip(), text, remark.get("not run", ""), added)
            place, remark = end, {}
        elif line.strip():
            remark = {}
        place += 1


def prose(page: str) -> str:
    """A page without its blocks of code and its comments."""
    text = re.sub(r"<!--.*?-->", "", read(page), flags=re.DOTALL)
    return re.sub(r"^( *)(`{3,})[^`\n]*\n.*?^ *\2$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The anchors of the headings of a Markdown text, as GitHub and Sphinx make them."""
    text = re.sub(r"^( *)(`{3,})[^`\n]*\n.*?^ *\2$", "", text, flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        number = next(n for n in range(1000) if (plain if n == 0 else f"{plain}-{n}") not in found)
        found.add(plain if number == 0 else f"{plain}-{number}")
    return found


def links(text: str) -> list[str]:
    """The targets of a Markdown text's links and pictures."""
    return re.findall(r"\]\(<?([^)\s>]+)>?\)", text)


def toctree(page: str) -> list[str]:
    """The pages that a page's tables of contents name, below docs/."""
    entries = [
        entry
        for block in blocks(page)
        if block.language == "{toctree}"
        for entry in block.text.splitlines()
        if entry.strip() and not entry.startswith(":")
    ]
    folder = Path(page).parent
    return [(folder / re.sub(r"^.*<(.*)>$", r"\1", entry.strip())).as_posix() + ".md" for entry in entries]


def code(block: Block) -> Any:
    """A Python block, compiled so that a traceback shows its page and line."""
    text = re.sub(r"\A(:[\w-]+:.*\n)+", lambda options: "\n" * options[0].count("\n"), block.text)
    return compile("\n" * block.line + text, f"docs/{block.page}", "exec")


def run_apart(page: str, folder: Path, *, last: str) -> str:
    """Run a page's Python in an interpreter of its own, and return what it has printed.

    Args:
        page: The page.
        folder: Where it runs.
        last: A line of Python to run at the end.
    """
    texts = [block.text for block in blocks(page) if block.language in PYTHON and not block.not_run]
    (folder / "page.py").write_text("\n".join([*texts, last, ""]))
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "offline"}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | quiet
    command = [sys.executable, "page.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout
