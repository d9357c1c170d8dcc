"""Two ranks under Lightning's DDP and FSDP2 strategies: one model, every example once, the engine's trace, resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adadagrad import Bounds, NormTest
from tests.integrations.lightning.cases import MICRO, N, Net, plain

ROOT = Path(__file__).parents[3]


def torchrun(folder, kind):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(Path(__file__).with_name("ranks.py")), str(folder), kind]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return [
        [json.loads((folder / f"{run}-{rank}.json").read_text()) for rank in (0, 1)] for run in ("whole", "resumed")
    ]


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def runs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, *torchrun(folder, request.param)


def test_ranks_hold_one_model_after_every_micro_batch(runs):
    kind, (first, second), _ = runs
    assert first["weights"] == second["weights"]
    assert first["sizes"] == second["sizes"]
    if kind == "ddp":
        assert max(first["apart"] + second["apart"]) == 0.0
        assert len(first["apart"]) == 4 * 7


def test_the_trace_and_the_weights_are_those_of_one_process(runs):
    _, (first, _), _ = runs
    alone = Net()
    sizes = plain(
        alone,
        epochs=4,
        policy=NormTest(eta=0.3),
        global_batch_size=2 * MICRO,
        bounds=Bounds(max_growth=1.6, multiple_of=2 * MICRO),
    )
    assert first["sizes"] == sizes
    assert len(set(sizes)) > 3
    for ours, theirs in zip(first["weights"], alone.parameters(), strict=True):
        torch.testing.assert_close(torch.tensor(ours), theirs.detach().flatten(), rtol=0, atol=1e-6)


def test_every_example_once_an_epoch_over_both_ranks(runs):
    _, (first, second), _ = runs
    assert first["batches"] == second["batches"] == 4 * 7
    assert sorted(first["seen"] + second["seen"]) == sorted(list(range(N)) * 4)


def test_resumed_from_lightnings_checkpoint(runs):
    _, whole, resumed = runs
    for first, then in zip(whole, resumed, strict=True):
        assert then["steps"][0] == 4
        assert then["sizes"] == first["sizes"][3:]
        for ours, theirs in zip(then["weights"], first["weights"], strict=True):
            assert ours == theirs
