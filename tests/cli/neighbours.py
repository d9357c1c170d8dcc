"""What the tests of the neighbours' commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def rows_of(directory: Path) -> list[dict[str, Any]]:
    """The lines that a command has left."""
    return [json.loads(line) for line in (directory / "rows.jsonl").read_text().splitlines()]


def page_of(directory: Path) -> str:
    """Its page, which needs nothing from outside."""
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    for outside in ('src="http', "src='http", 'href="http', "@import", "url(http"):
        assert outside not in page
    return page
