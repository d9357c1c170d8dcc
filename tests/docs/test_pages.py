"""The documentation: every block of code runs, every page is reached from the first one, every link leads somewhere."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import adadagrad
from adadagrad.cli import COMMANDS, main
from tests.cli.mnist_folder import write_mnist
from tests.docs.checks import APART, CHECKS, NEEDS
from tests.docs.pages import (
    DOCS,
    PAGES,
    PYTHON,
    ROOT,
    SHELL,
    SHOWN,
    anchors,
    blocks,
    code,
    links,
    prose,
    read,
    run_apart,
    toctree,
)

OWN_MODULE = """
import torch

def make_data():
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
    return torch.utils.data.Subset(data, range(200)), torch.utils.data.Subset(data, range(200, 300))

def make_model():
    return torch.nn.Linear(6, 2)
"""
WITH_CODE = [
    page for page in PAGES if any(not b.not_run and (b.language in PYTHON or b.commands) for b in blocks(page))
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a page runs: beside a user's own module, and a folder in which small files imitate MNIST."""
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "my_module.py").write_text(OWN_MODULE)
    write_mnist(tmp_path / "DIR", train=256, test=64)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("ADADAGRAD_DATA", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def run_command(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as ended:  # of --help
        return int(ended.code or 0)


NOTEBOOKS = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("ADADAGRAD_SLOW") != "1", reason="`make site`, which CI calls, runs notebooks"),
]


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=NOTEBOOKS if page.startswith("notebooks/") else ()) for page in WITH_CODE]
)
def test_every_block_of_a_page_runs(page: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in NEEDS.get(page, ()):
        pytest.importorskip(package)
    names: dict[str, Any] = {"__name__": "__main__"}
    if page in APART:
        print(run_apart(page, folder, last=APART[page]))
    for block in blocks(page):
        if block.not_run:
            continue
        if block.language in PYTHON and page not in APART:
            exec(code(block), names)
        for arguments in block.commands:
            assert run_command(arguments) == 0, f"{page}:{block.line}: adadagrad {' '.join(arguments)}"
    said = capsys.readouterr().out
    if page in CHECKS:
        CHECKS[page](names, said)


def test_every_check_is_of_a_page_that_is_there() -> None:
    assert set(CHECKS) <= set(WITH_CODE)
    assert {*APART, *NEEDS} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_the_language_of_every_block_is_named_and_known(page: str) -> None:
    for block in blocks(page):
        known = block.language in (*PYTHON, *SHELL, *SHOWN) or block.language.startswith("{")
        assert known, f"{page}:{block.line}: name the language of the block"


def test_few_blocks_are_not_run_and_each_says_why() -> None:
    left = [block for page in PAGES for block in blocks(page) if block.not_run]
    assert all(len(block.not_run) > 10 for block in left)
    assert len(left) <= 20, [f"{block.page}:{block.line}: {block.not_run}" for block in left]


def test_a_command_is_never_left_out_by_its_shape() -> None:
    for page in PAGES:
        for block in blocks(page):
            if block.language in SHELL and not block.not_run:
                calls = [line for line in block.text.splitlines() if re.match(r"(\$ )?(python -m )?adadagrad ", line)]
                assert len(calls) == len(block.commands)
                assert "-m adadagrad" not in re.sub(r"(?m)^(\$ )?python -m adadagrad ", "", block.text)


def test_the_commands_that_are_not_run_exist_too() -> None:
    typed = [words for page in PAGES for block in blocks(page) for words in block.commands]
    assert typed
    assert all(words[0] in COMMANDS or words[0].startswith("-") for words in typed)


def test_every_page_is_reached_from_the_first_one() -> None:
    reached, waiting = {"index.md"}, ["index.md"]
    while waiting:
        for page in toctree(waiting.pop()):
            assert page in PAGES, f"{page} is in a table of contents and does not exist"
            if page not in reached:
                reached.add(page)
                waiting.append(page)
    assert sorted(reached) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for link in links(prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        path = (DOCS / page).parent / target if target else DOCS / page
        assert path.exists(), f"{page}: {link}"
        assert path.resolve().is_relative_to(ROOT), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_pictures_are_small(page: str) -> None:
    for link in links(prose(page)):
        if link.endswith(".png") and link not in DRAWN_BEFORE:
            size = ((DOCS / page).parent / link).stat().st_size
            assert size <= 150 * 1024, f"{link}: {size / 1024:.0f} KiB"


DRAWN_BEFORE = {"pictures/defaults.png", "pictures/mnist-logistic.png"}  # 200 KiB each, drawn by the benchmarks


def test_every_public_name_is_documented_once() -> None:
    listed = [
        name
        for page in PAGES
        if page.startswith("api/")
        for name in re.findall(r"^\.\. auto(?:class|function):: adadagrad\.(\w+)$", read(page), re.MULTILINE)
    ]
    assert sorted(listed) == sorted(set(adadagrad.__all__) - {"__version__"})
