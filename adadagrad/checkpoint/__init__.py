"""Checkpoints: whole or not at all, verified before use, the last few kept, the newest good one found."""

from __future__ import annotations

from adadagrad.checkpoint.file import VERSION, load_checkpoint, save_checkpoint
from adadagrad.checkpoint.random_states import random_states, set_random_states
from adadagrad.checkpoint.store import CheckpointStore

__all__ = ["VERSION", "CheckpointStore", "load_checkpoint", "random_states", "save_checkpoint", "set_random_states"]
