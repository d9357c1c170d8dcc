"""Settings of all tests."""

from __future__ import annotations

import torch

# Two test processes share two cores; more threads than cores would make small kernels wait for each other.
torch.set_num_threads(1)
