"""The memory benchmark counts bytes exactly and compares the cases that its table names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import memory
from benchmarks.models import Workload

TINY = Workload(lambda: nn.Linear(6, 10), 300, (6,))


def test_the_peak_is_what_is_alive_at_one_time() -> None:
    def step() -> None:
        first = torch.empty(1000)  # 4,000 bytes
        second = torch.empty(500)
        del first
        third = torch.empty(100)
        del second, third

    assert memory.peak_bytes(step) == 6000


def test_what_is_there_before_the_step_does_not_count() -> None:
    kept = [torch.empty(1000)]
    assert memory.peak_bytes(lambda: kept.append(torch.empty(10))) == 40
    assert memory.peak_bytes(kept.clear) == 0


def test_fixed_is_model_optimizer_and_data() -> None:
    parameters = 4 * (60 + 10)
    steps = 2 * 4  # Adagrad counts steps in a float32 for each of the two parameters
    assert memory.fixed_bytes(TINY, 5) == 2 * parameters + steps + 4 * 5 * 6 + 8 * 5


def test_a_case_repeats_to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(memory.MODELS, "logistic", TINY)
    plain = memory.case("logistic", "plain", 20)
    assert plain["verifying"] == plain["peak"]
    found = [memory.case("logistic", "all", 20) for _ in range(2)]
    assert found[0]["peak"] == found[1]["peak"]
    assert found[0]["verifying"] > found[0]["peak"] >= plain["peak"]


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def in_fresh_process(name: str, kind: str, n: int, threads: int) -> dict[str, int]:
        asked.append((name, kind, n, threads))
        peak = {"plain": 2_000_000, "all": 2_200_000, "default": 1_500_000}[kind]
        return {"peak": peak, "verifying": 2 * peak, "resident": 3 * peak, "fixed": 2_000_000}

    before = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "in_fresh_process", in_fresh_process)
    memory.main(["--models", "gpt", "--multiples", "1", "4", "--threads", str(before)])
    kinds = ("plain", "all", "default")
    assert asked == [("gpt", kind, n, before) for n in (16, 64) for kind in kinds]
    line = "| gpt b=16 | 2.00 | 2.00 | 1.100 (1.050) | 0.750 (0.875) | -0.50 | 2.200 | 6.0 | 6.6 | 4.5 |"
    assert line in capsys.readouterr().out
    assert json.loads(Path("results/memory.json").read_text())["rows"]["gpt b=64"]["all"]["peak"] == 2_200_000
