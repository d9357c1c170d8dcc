"""The tutorials: their Python runs from the first block to the last and does what the text says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from adadagrad.cli import COMMANDS

pytest.importorskip("sklearn")
FOLDER = Path(__file__).parents[2] / "docs" / "tutorials"
PAGES = sorted(path.name for path in FOLDER.glob("*.md"))


def run(name: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (FOLDER / name).read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, f"docs/tutorials/{name}", "exec"), names)
    return names


def test_federated(caplog: pytest.LogCaptureFixture) -> None:
    names = run("federated.md")
    assert names["accuracy"] > 0.5
    assert names["records"][0].left_out == {7: "no message"}
    assert all(bool(p.isfinite().all()) for p in names["model"].parameters())
    assert set(names["state"]) == {"model", "optimizer", "tail"}


def test_universal_perturbation() -> None:
    plain, robust = run("universal-perturbation.md")["reports"].values()
    assert plain.clean_accuracy > 0.9
    assert plain.fooling_ratio > 2 * plain.random_sign.fooling_ratio
    assert robust.fooling_ratio < 0.7 * plain.fooling_ratio


def test_dynamic_scale() -> None:
    names = run("dynamic-scale.md")
    batcher = names["batcher"]
    assert 0.2 < batcher.stitched_fraction < 0.8
    assert batcher.images_read == 8 * 30 + 3 * 8 * round(30 * batcher.stitched_fraction)
    assert torch.isfinite(torch.tensor([names["small"], names["large"]])).all()


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_links_of_a_page_exist(page: str) -> None:
    text = (FOLDER / page).read_text(encoding="utf-8")
    typed = [shlex.split(line) for line in text.splitlines() if line.startswith("adadagrad ")]
    assert typed
    assert all(words[1] in COMMANDS for words in typed)
    for target, anchor in re.findall(r"\]\((\.\./[\w.-]+)(?:#([\w-]+))?\)", text):
        linked = (FOLDER / target).read_text(encoding="utf-8")
        titles = [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in re.findall(r"^#+ (.*)$", linked, re.M)]
        assert not anchor or anchor in titles
