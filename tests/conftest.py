"""Settings of all tests."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import settings

# Two test processes share two cores; more threads than cores would make small kernels wait for each other.
torch.set_num_threads(1)

# No test asserts a time, and a busy machine must not make one fail; the same examples are drawn in every run.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a test whose name holds an address: parallel workers would collect different names and run nothing."""
    unstable = [item.nodeid for item in items if re.search(r" at 0x[0-9a-f]+", item.nodeid)]
    if unstable:
        raise pytest.UsageError(f"give these parametrized tests ids that repeat: {', '.join(unstable[:3])}")
