"""Which batch size: pure arithmetic on a record, no torch."""

from adadagrad.policies.base import AbstractPolicy
from adadagrad.policies.bounds import ceil_with_guard, check_bounds, next_batch_size
from adadagrad.policies.coordinate import CoordinateNormTest
from adadagrad.policies.geometric import GeometricBatch
from adadagrad.policies.inner_product import AugmentedInnerProductTest, InnerProductTest
from adadagrad.policies.norm import NormTest
from adadagrad.policies.schedules import ConstantBatch, LinearBatch
from adadagrad.policies.staged import StagedBatch

__all__ = [
    "AbstractPolicy",
    "AugmentedInnerProductTest",
    "ConstantBatch",
    "CoordinateNormTest",
    "GeometricBatch",
    "InnerProductTest",
    "LinearBatch",
    "NormTest",
    "StagedBatch",
    "ceil_with_guard",
    "check_bounds",
    "next_batch_size",
]
