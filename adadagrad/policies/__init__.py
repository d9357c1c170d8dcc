"""Which batch size: pure arithmetic on a record, no torch."""

from adadagrad.policies.base import AbstractPolicy
from adadagrad.policies.big_batch import BigBatch
from adadagrad.policies.bounds import ceil_with_guard, check_bounds, next_batch_size
from adadagrad.policies.cabs import CABS
from adadagrad.policies.coordinate import CoordinateNormTest
from adadagrad.policies.divebatch import DiveBatch
from adadagrad.policies.geometric import GeometricBatch
from adadagrad.policies.inner_product import AugmentedInnerProductTest, InnerProductTest
from adadagrad.policies.noise_scale import GradientNoiseScale
from adadagrad.policies.norm import NormTest
from adadagrad.policies.recorded import RecordedBatch
from adadagrad.policies.schedules import ConstantBatch, LinearBatch
from adadagrad.policies.staged import StagedBatch

__all__ = [
    "CABS",
    "AbstractPolicy",
    "AugmentedInnerProductTest",
    "BigBatch",
    "ConstantBatch",
    "CoordinateNormTest",
    "DiveBatch",
    "GeometricBatch",
    "GradientNoiseScale",
    "InnerProductTest",
    "LinearBatch",
    "NormTest",
    "RecordedBatch",
    "StagedBatch",
    "ceil_with_guard",
    "check_bounds",
    "next_batch_size",
]
