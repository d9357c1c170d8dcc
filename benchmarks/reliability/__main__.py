"""``python -m benchmarks.reliability [--reduced] [--only gradient,faults]``: the battery, one figure a line."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

TOPICS: tuple[str, ...] = (
    "gradient",
    "stream",
    "decisions",
    "checkpoints",
    "kills",
    "faults",
    "ranks",
    "traces",
    "soak",
    "overhead",
)
"""The files beside this one, in the order in which they run."""


def main() -> int:
    """Run the chosen topics; the exit status is the number of figures that miss their bar, at most 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability", description=__doc__)
    parser.add_argument("--reduced", action="store_true", help="the short form that the test suite runs")
    parser.add_argument("--only", default=",".join(TOPICS), help=f"topics, of {', '.join(TOPICS)}")
    arguments = parser.parse_args()
    failed = 0
    for topic in filter(None, arguments.only.split(",")):
        for figure in import_module(f"benchmarks.reliability.{topic}").figures(arguments.reduced):
            print(figure.line(), flush=True)
            failed += not figure.passed
    print(f"{failed} figures miss their bar" if failed else "all bars met")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
