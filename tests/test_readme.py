"""The README's Python runs as it stands, from the first block to the last."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from adadagrad.cli.flags import option_names

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # torch's, about Lightning
def test_every_python_block_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    engine = names["engine"]
    assert engine.samples_seen == engine.total_samples == 4_000
    assert names["stats"].variance_trace > 0


def test_the_flags_it_names_exist() -> None:
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README.read_text(encoding="utf-8")))
    known = {f"--{name.replace('_', '-')}" for name in option_names()}
    assert len(flags) > 5
    assert flags <= known | {"--config", "--out", "--resume", "--help", "--nproc-per-node"}  # the last is of torchrun


def test_the_commands_it_names_exist() -> None:
    text = README.read_text(encoding="utf-8")
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", text, re.MULTILINE):
        assert f"\n{target}:" in makefile
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (README.parent / link).exists(), link


def test_the_source_distribution_holds_what_the_readme_and_its_tests_need() -> None:
    project = tomllib.loads((README.parent / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8"))
    needed = {"Makefile", "constraints.txt", *(link.split("/")[0] for link in links if not link.startswith("http"))}
    assert needed <= {path.strip("/") for path in included}
    assert all((README.parent / path.strip("/")).exists() for path in included)
