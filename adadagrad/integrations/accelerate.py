"""Accelerate: what the engine needs of it beside ``AdaptiveBatch(..., accelerator=accelerator)``.

Needs the extra ``hf``. A script keeps its ``accelerator.prepare``; its loop becomes the engine's:

    accelerator = Accelerator(mixed_precision="bf16", log_with="tensorboard", project_dir="runs")
    model, optimizer = accelerator.prepare(model, optimizer)
    engine = AdaptiveBatch(model, optimizer, data, NormTest(eta=0.25), epochs=10, accelerator=accelerator)
    for step in engine:
        step.run(lambda batch: loss_fn(model(batch[0]), batch[1]))
        log_decision(accelerator, step.update())

``accelerator.save_state`` and ``load_state`` hold how far the engine is, from its construction on; the accelerator's
precision, devices and ranks are the engine's. `docs/accelerate.md` says what is refused, and why.
"""

from adadagrad.core.errors import MissingExtra
from adadagrad.core.records import Decision
from adadagrad.integrations.metrics import decision_metrics

try:
    from accelerate import Accelerator  # type: ignore[import-untyped]
except ImportError as missing:
    raise MissingExtra("accelerate", "hf") from missing

__all__ = ["log_decision"]


def log_decision(accelerator: Accelerator, decision: Decision, **metrics: float) -> None:
    """Send what a step has shown and decided to the trackers of ``accelerator.init_trackers``.

    Under the number of the step, with ``samples_seen`` beside it to draw by: the work that a step does changes with its
    batch, so that curves over steps of two runs cannot be compared.

    Args:
        accelerator: The user's; without trackers nothing happens.
        decision: What ``step.update()`` returned, the same on every rank; Accelerate writes on the first.
        **metrics: More numbers for the same line, by name.
    """
    accelerator.log({**decision_metrics(decision), **metrics}, step=decision.step)
