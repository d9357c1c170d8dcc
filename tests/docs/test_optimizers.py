"""docs/optimizers.md: its table names what there is."""

from __future__ import annotations

import adadagrad as ada
from adadagrad import optimizers
from tests.docs.pages import read

PAGE = read("optimizers.md")


def test_every_optimizer_is_in_the_table_and_public() -> None:
    table = "\n".join(line for line in PAGE.splitlines() if line.startswith("| `"))
    for name in optimizers.__all__:
        assert f"`{name}`" in table
        assert name in ada.__all__
