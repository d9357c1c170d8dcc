"""How long ``import adadagrad`` takes beside ``import torch``.

    python -m benchmarks.import_time [--rounds 15]

Fresh processes in turn, one of each kind a round, so that a machine that becomes busy is busy for all; a row's cost is
the median over rounds of its difference from ``import torch`` in the same round. A name of the library is imported when
it is first used, so the second row says what the first use of all of them costs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from statistics import median, quantiles

from benchmarks.machine import machine, write_json

BASE = "import torch"
ROWS = {
    "import torch": BASE,
    "import adadagrad": f"{BASE}\nimport adadagrad",
    "a torch optimizer made": f"{BASE}\ntorch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)",
    "every public name used": f"{BASE}\nimport adadagrad\nfor name in adadagrad.__all__: getattr(adadagrad, name)",
}
BAR = 0.15
"""Seconds that ``import adadagrad`` may take over ``import torch``."""


def seconds(code: str) -> float:
    """Run a line in a fresh interpreter.

    Args:
        code: The line.

    Returns:
        Wall time from start to exit [s].
    """
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


def measure(rounds: int) -> dict[str, list[float]]:
    """Time every row once a round, after one round that fills the file cache.

    Args:
        rounds: How many are counted.

    Returns:
        Seconds by row.
    """
    found: dict[str, list[float]] = {name: [] for name in ROWS}
    for number in range(rounds + 1):
        for name, code in ROWS.items():
            taken = seconds(code)
            if number:
                found[name].append(taken)
    return found


def table(found: dict[str, list[float]]) -> str:
    """Return the rows as a Markdown table.

    Args:
        found: Seconds by row.

    Returns:
        The text.
    """
    base = found["import torch"]
    lines = ["| process | median s | over import torch, median s | quartiles |", "|---|---|---|---|"]
    for name, times in found.items():
        over = [one - other for one, other in zip(times, base, strict=True)]
        low, _, high = quantiles(over, n=4)
        lines.append(f"| {name} | {median(times):.3f} | {median(over):+.3f} | {low:+.3f} to {high:+.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, and write the times."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="processes of each kind (default: %(default)s)")
    found = measure(parser.parse_args().rounds)
    over = median(one - other for one, other in zip(found["import adadagrad"], found["import torch"], strict=True))
    print(machine())
    print(table(found))
    print(f"import adadagrad over import torch: {over:.3f} s, at most {BAR} s: {'yes' if over <= BAR else 'NO'}")
    write_json("import_time", {"rows": found})


if __name__ == "__main__":
    main()
