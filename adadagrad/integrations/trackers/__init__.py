"""Experiment trackers: a run in TensorBoard, Weights & Biases, MLflow, trackio or a Prometheus text file.

All of them are a `Tracker`: two methods, and samples seen as the x axis, on which runs with different batch sizes can
be compared. Each needs the extra of its name, except Prometheus, which needs none. In a loop of one's own:

    with closing(TensorBoard("runs/one/tensorboard")) as tracker:
        for step in engine:
            step.run(loss)
            track(step.update(), tracker, engine.policy)

From a run directory, while the run goes on or afterwards, everything once: `follow`.
"""

from adadagrad.integrations.trackers.base import Tracker
from adadagrad.integrations.trackers.follow import Follower, follow
from adadagrad.integrations.trackers.metrics import metrics_of, track
from adadagrad.integrations.trackers.mlflow import MLflow
from adadagrad.integrations.trackers.prometheus import Prometheus
from adadagrad.integrations.trackers.tensorboard import TensorBoard
from adadagrad.integrations.trackers.trackio import Trackio
from adadagrad.integrations.trackers.wandb import WandB

__all__ = [
    "Follower",
    "MLflow",
    "Prometheus",
    "TensorBoard",
    "Tracker",
    "Trackio",
    "WandB",
    "follow",
    "metrics_of",
    "track",
]
