"""Importing the library waits for nothing: every public name is found, and what needs no torch does not load it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import adadagrad


def python(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter that finds this package, and before everything else what lies in a folder."""
    root = str(Path(adadagrad.__file__).parents[1])
    folders = [root] if path is None else [str(path), root]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=120)


def test_names_for_the_type_checker_and_for_the_interpreter_agree() -> None:
    tree = ast.parse(Path(adadagrad.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == {name: f"adadagrad.{home}" for name, home in adadagrad._HOME.items()}
    assert sorted(adadagrad.__all__) == sorted([*typed, "__version__"])


def test_every_public_name_is_found_and_listed() -> None:
    for name in adadagrad.__all__:
        assert getattr(adadagrad, name) is getattr(adadagrad, name)
    assert set(adadagrad.__all__) <= set(dir(adadagrad))
    with pytest.raises(AttributeError, match="module 'adadagrad' has no attribute 'NormTets'"):
        _ = adadagrad.NormTets


@pytest.mark.parametrize(
    "line",
    [
        "import adadagrad",
        "from adadagrad import NormTest, Observation, GradientStatistics, Bounds; NormTest().threshold",
        "import adadagrad; adadagrad.policies.next_batch_size, adadagrad.core.records",
        "import adadagrad.report.page",
        "from adadagrad.cli import main; main(['--help']), main(['--version']), main(['nonsense'])",
        "import adadagrad.cli.report",
    ],
)
def test_torch_is_not_imported_where_it_is_not_used(line: str) -> None:
    done = python("-c", f"{line}\nimport sys\nassert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


BROUGHT = """
import sys, torch
before = {name.partition(".")[0] for name in sys.modules}
import adadagrad
EVERYTHING
found = {name.partition(".")[0] for name in sys.modules} - before - {"adadagrad"}
from importlib.metadata import packages_distributions
owners = packages_distributions()
print(*sorted({owner for name in found for owner in owners.get(name, [])}))
"""


@pytest.mark.parametrize(
    ("line", "brought"),
    [("", set()), ("for name in adadagrad.__all__: getattr(adadagrad, name)", {"mpmath", "sympy"})],
    ids=["import adadagrad", "every name"],
)
def test_it_brings_nothing_beside_torch_and_what_torch_itself_requires(line: str, brought: set[str]) -> None:
    done = python("-W", "error", "-c", BROUGHT.replace("EVERYTHING", line))
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= brought


def test_ctrl_c_while_torch_is_being_imported_is_one_line(tmp_path: Path) -> None:
    """Torch takes seconds to import, and that is when a user sees that a flag was forgotten."""
    tmp_path.joinpath("torch.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)\n"
    )
    done = python("-m", "adadagrad", "train", path=tmp_path)
    assert (done.returncode, done.stderr) == (130, "adadagrad: interrupted\n")
