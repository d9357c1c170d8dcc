"""The comparison with other packages: what needs none of them."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import rivals
from benchmarks.models import MODELS, Workload
from benchmarks.rival_methods import OURS, REWRITTEN, RIVALS, Method, Unsupported, attempt, error, exact_gradients

TINY = Workload(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 10)), 20, (6,))
PACKAGES = [name for name in RIVALS if name != "vmap"]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("opacus", "opacus.grad_sample", "backpack"):
        monkeypatch.setitem(sys.modules, name, None)  # the import system's sign for "not there"


@pytest.mark.parametrize("method", [RIVALS["vmap"], OURS["PerExample"]], ids=["vmap", "PerExample"])
def test_norms_equal_the_loop(method: Method) -> None:
    x, y = TINY.data(TINY.batch)
    model, step = method.make(TINY, x, y)
    for _ in range(method.warm_up):
        step()
    expected = exact_gradients(model, x, y).square().sum(1)
    torch.testing.assert_close(method.read(step).double(), expected, rtol=1e-5, atol=0)
    assert error(method, TINY, x, y) < 1e-5


def test_the_vmapped_step_trains_as_the_plain_one() -> None:
    x, y = TINY.data(TINY.batch)
    plain, step = rivals.plain(TINY, x, y)
    step()
    other, step = RIVALS["vmap"].make(TINY, x, y)
    step()
    for p, q in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_rewritten_model_is_the_same_function() -> None:
    work = MODELS["gpt"]
    x, _ = work.data(2)
    torch.testing.assert_close(REWRITTEN["gpt"].fresh()[0](x), work.fresh()[0](x), rtol=0, atol=0)


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_says_what_to_do(name: str) -> None:
    with pytest.raises(Unsupported, match=r"opacus|backpack") as caught:
        attempt(RIVALS[name], TINY, *TINY.data(4))
    assert caught.value.cell == "not installed: make rivals"


def test_a_failure_is_the_reason() -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no rule for this layer\nand more")

    with pytest.raises(Unsupported, match=r"^RuntimeError: no rule for this layer$") as caught:
        attempt(Method(fails), TINY, *TINY.data(4))
    assert caught.value.cell == "not supported"


def test_modules_that_a_package_warns_of_are_named() -> None:
    def fails(*_: Any) -> Any:
        for name in ("a.Norm", "a.Norm", "a.Block"):
            warnings.warn(f"batch_l2 does not have an extension for Module <class '{name}'> although", stacklevel=1)
        raise AttributeError("no attribute 'batch_l2'")

    with pytest.raises(Unsupported, match=r"'batch_l2'; without an extension: a\.Block, a\.Norm$"):
        attempt(Method(fails), TINY, *TINY.data(4))


@pytest.mark.usefixtures("nothing_installed")
def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(rivals.MODELS, "logistic", TINY)
    rivals.main([
        "--models",
        "logistic",
        "--methods",
        "vmap",
        "BackPACK L2",
        "--rounds",
        "2",
        "--threads",
        "1",
        "--tries",
        "1",
    ])
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("| logistic b=20"))
    assert row.endswith("| not installed: make rivals |")
    assert "BackPACK L2 on logistic: import of backpack halted" in out
    found = json.loads(Path("results/rivals.json").read_text())["rows"]["logistic"]
    assert len(found["first"]["PerExample"]) == 2
    assert set(found["errors"]) == {"PerExample", "Probe(probes=4)", "vmap"}
