"""What a page's code must have done, beyond running from its first block to its last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.docs.pages import blocks
from tests.integrations.trackers import prometheus_values, tensorboard_rows


def launch(names: dict[str, Any], said: str) -> None:
    run, again = names["run"], names["again"]
    assert run.samples_seen == again.samples_seen == 500
    assert run.steps == again.steps
    assert names["engine"].samples_seen == 6_000
    assert list(Path("runs/long/checkpoints").iterdir())


def optimizers(names: dict[str, Any], said: str) -> None:
    engine = names["engine"]
    assert engine.samples_seen == 1024
    assert engine.global_batch_size > 16
    assert "'entries': 640, 'chosen': 33" in said
    assert "'0': " in said


def federated(names: dict[str, Any], said: str) -> None:
    assert names["accuracy"] > 0.5
    assert names["records"][0].left_out == {7: "no message"}
    assert all(bool(p.isfinite().all()) for p in names["model"].parameters())
    assert set(names["state"]) == {"model", "optimizer", "tail"}


def universal_perturbation(names: dict[str, Any], said: str) -> None:
    plain, robust = names["reports"].values()
    assert plain.clean_accuracy > 0.9
    assert plain.fooling_ratio > 2 * plain.random_sign.fooling_ratio
    assert robust.fooling_ratio < 0.7 * plain.fooling_ratio


def dynamic_scale(names: dict[str, Any], said: str) -> None:
    batcher = names["batcher"]
    assert 0.2 < batcher.stitched_fraction < 0.8
    assert batcher.images_read == 8 * 30 + 3 * 8 * round(30 * batcher.stitched_fraction)
    assert torch.isfinite(torch.tensor([names["small"], names["large"]])).all()


def start(names: dict[str, Any], said: str) -> None:
    assert names["engine"].samples_seen == 20_000
    assert names["engine"].global_batch_size > 16
    assert Path("runs/first/report.html").is_file()


def loop(names: dict[str, Any], said: str) -> None:
    assert names["whole"].samples_seen == names["rest"].samples_seen == 2_000
    assert names["half"].steps == 30
    assert names["stats"].noise_scale > 0
    assert names["step"].finished
    assert Path("runs/loop/report.html").is_file()


def faq(names: dict[str, Any], said: str) -> None:
    reasons = names["reasons"]
    assert reasons["not measured"] > reasons["hold"] + reasons["grow"] > 0
    assert "BatchNorm1d" in said
    assert "max_overhead=0.05: one step in" in said


def migration(names: dict[str, Any], said: str) -> None:
    assert list(Path("runs/from-adaptdl/checkpoints").iterdir())
    constant, paper = said.splitlines()[0].split(), said.splitlines()[-1].split()
    assert float(constant[1]) >= 320 * 32  # the progress that AdaScale counts, in fewer steps than the base batch takes
    assert int(constant[0]) < 320
    assert int(constant[2]) == 128 * int(constant[0])
    assert int(paper[1]) == 1024


def trackers(names: dict[str, Any], said: str) -> None:
    rows = tensorboard_rows(Path("runs/one/tensorboard"))
    assert rows["adadagrad/global_batch_size"][-1][0] == 2000
    assert {"adadagrad/relative_variance", "adadagrad/threshold", "adadagrad/loss", "adadagrad/step"} <= set(rows)
    assert names["sent"] == len(rows["adadagrad/loss"])
    values = prometheus_values(Path("runs/one/metrics.prom").read_text())
    (example,) = (block.text for block in blocks("trackers.md") if block.language == "text")
    assert {line.split("{")[0] for line in example.splitlines()} <= {name for name, _ in values}
    assert values["adadagrad_samples_seen", (("run", "one"),)] == 2000
    assert Path("runs/train-001/metrics.prom").is_file()


def watch(names: dict[str, Any], said: str) -> None:
    assert names["address"].startswith("http://127.0.0.1:")


def host(names: dict[str, Any], said: str) -> None:
    assert said.split()[-3:] == ["3", "2000", "True"]


def lightning(names: dict[str, Any], said: str) -> None:
    assert int(said.split()[-1]) == 6000


def transformers(names: dict[str, Any], said: str) -> None:
    assert said.split()[-2:] == ["True", "160"]


CHECKS: dict[str, Callable[[dict[str, Any], str], None]] = {
    "start.md": start,
    "loop.md": loop,
    "faq.md": faq,
    "migration.md": migration,
    "trackers.md": trackers,
    "watch.md": watch,
    "accelerate.md": host,
    "fabric.md": host,
    "lightning.md": lightning,
    "transformers.md": transformers,
    "launch.md": launch,
    "optimizers.md": optimizers,
    "tutorials/federated.md": federated,
    "tutorials/universal-perturbation.md": universal_perturbation,
    "tutorials/dynamic-scale.md": dynamic_scale,
}
"""By page: takes the names that its blocks have left, and what they have printed."""

APART = {
    "accelerate.md": "print(engine.steps, resumed.samples_seen, resumed.steps > 4)",
    "fabric.md": "print(engine.steps, resumed.samples_seen, resumed.steps > 4)",
    "lightning.md": "print(adaptive.engine.samples_seen)",
    "transformers.md": 'print(same, trainer.state.log_history[-1]["adadagrad/samples_seen"])',
}
"""Pages whose Python runs in an interpreter of its own, for other libraries' states and warnings; its last line."""

NEEDS = {
    "accelerate.md": ("accelerate",),
    "fabric.md": ("lightning",),
    "lightning.md": ("lightning",),
    "transformers.md": ("transformers", "accelerate"),
    "trackers.md": ("tensorboard",),
    "watch.md": ("jinja2",),
}
"""What must be installed for a page, beside what most of the suite needs."""
