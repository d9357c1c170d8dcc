"""Settings of all tests."""

from __future__ import annotations

import torch
from hypothesis import settings

# Two test processes share two cores; more threads than cores would make small kernels wait for each other.
torch.set_num_threads(1)

# No test asserts a time, and a busy machine must not make one fail; the same examples are drawn in every run.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")
