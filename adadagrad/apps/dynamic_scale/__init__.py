"""Dynamic scale training: the loss of one step chooses how the next batch is composed, regular or of shrunk images.

The same arrow as for batch sizes, with another end: a statistic of training goes in, a decision about the next batch
comes out. `LossShareFeedback` measures, a policy decides, `ScaleBatcher` delivers.
"""

from adadagrad.apps.dynamic_scale.batcher import ScaleBatcher
from adadagrad.apps.dynamic_scale.feedback import LossShareFeedback
from adadagrad.apps.dynamic_scale.policies import (
    AbstractScalePolicy,
    AlwaysStitch,
    NeverStitch,
    RandomPolicy,
    ThresholdPolicy,
)
from adadagrad.apps.dynamic_scale.roi_losses import MissingTorchvision, RoILosses, box_loss_vector
from adadagrad.apps.dynamic_scale.stitching import batch_stitch, stitch4
from adadagrad.apps.dynamic_scale.targets import xywh_to_xyxy

__all__ = [
    "AbstractScalePolicy",
    "AlwaysStitch",
    "LossShareFeedback",
    "MissingTorchvision",
    "NeverStitch",
    "RandomPolicy",
    "RoILosses",
    "ScaleBatcher",
    "ThresholdPolicy",
    "batch_stitch",
    "box_loss_vector",
    "stitch4",
    "xywh_to_xyxy",
]
