"""The engine: the only place where what was measured bends back to become the next batch."""

from __future__ import annotations

from adadagrad.engine.adaptive_batch import AdaptiveBatch
from adadagrad.engine.step import Step

__all__ = ["AdaptiveBatch", "Step"]
