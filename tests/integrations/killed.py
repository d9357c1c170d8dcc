"""A run under Accelerate or Fabric that kills itself, and goes on from the host's own checkpoint when started again.

    python -m tests.integrations.killed accelerate FOLDER [STEP]

In the middle of step STEP the process ends as by ``kill -9``. Each finished step is a line of FOLDER/trace.jsonl.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import adadagrad as ada
from tests.integrations.hosts import SETTINGS, make_data, make_model, make_optimizer, mean_loss, policy, weights

EVERY = 2
"""Steps between two checkpoints."""


def under_accelerate(folder: Path) -> tuple[ada.AdaptiveBatch, Callable[[], None]]:
    from tests.integrations.accelerators import make_accelerator, make_engine

    accelerator = make_accelerator()
    engine = make_engine(accelerator)

    def save() -> None:
        accelerator.save_state(str(folder / f"new-{engine.steps}"))
        (folder / f"new-{engine.steps}").rename(folder / f"state-{engine.steps:03d}")

    if saved := sorted(folder.glob("state-*")):
        accelerator.load_state(str(saved[-1]))
    return engine, save


def under_fabric(folder: Path) -> tuple[ada.AdaptiveBatch, Callable[[], None]]:
    from adadagrad.integrations.fabric import Progress, adaptive_batch, load
    from tests.integrations.fabrics import make_fabric

    fabric, own = make_fabric(), make_model()
    model, optimizer = fabric.setup(own, make_optimizer(own))
    engine = adaptive_batch(fabric, model, optimizer, make_data(), policy(), **SETTINGS)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "engine": Progress(engine)}

    def save() -> None:
        fabric.save(folder / f"new-{engine.steps}", state)
        (folder / f"new-{engine.steps}").rename(folder / f"state-{engine.steps:03d}")

    if saved := sorted(folder.glob("state-*")):
        load(fabric, saved[-1], state)
    engine.model = model
    return engine, save


HOSTS = {"accelerate": under_accelerate, "fabric": under_fabric}


def main(host: str, folder: Path, end: int) -> None:
    torch.set_num_threads(1)
    engine, save = HOSTS[host](folder)
    for step in engine:

        def loss(batch: Any) -> torch.Tensor:
            if engine.steps + 1 == end:
                os.kill(os.getpid(), signal.SIGKILL)
            return mean_loss(engine.model)(batch)

        step.run(loss)
        decision = step.update()
        with (folder / "trace.jsonl").open("a") as file:
            line = {"step": decision.step, "size": decision.plan.global_batch_size, "loss": decision.observation.loss}
            file.write(json.dumps(line) + "\n")
        if decision.step % EVERY == 0:
            save()
    torch.save(weights(engine), folder / "weights.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else -1)
