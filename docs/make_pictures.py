"""Make the pictures of docs/report.md: photograph the parts of the demo's report in a headless browser.

    python docs/make_pictures.py [--report runs/compare-001/report.html]

Needs chromium or google-chrome on the path. Without ``--report`` it runs ``adadagrad compare --data digits`` first, in
a temporary folder.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

PICTURES = Path(__file__).resolve().parent / "pictures"
WIDTH, HEIGHT = 760, 1200
TABLE_WIDTH = 1040
COLOURS = 64
"""Enough for lines and text, at a third of the bytes."""

PARTS = {
    "table": "report-table.png",
    "Batch size against samples": "report-batch-size.png",
    "Learning rate against samples": "report-learning-rate.png",
    "Validation accuracy against samples": "report-samples.png",
    "Validation accuracy against steps": "report-steps.png",
    "The two sides of the test against samples": "report-sides.png",
    "Noise scale against samples": "report-noise.png",
}
"""Which figure of the report becomes which file; `table` is the one above them."""


def parts(page: str) -> dict[str, str]:
    """Cut a report into pages that each show one part.

    Args:
        page: The report.

    Returns:
        By the name in `PARTS`, a page with the report's own styles; figures without the text below them.
    """
    head = page[: page.index("<body")]
    found = re.search(r"<table.*?</table>", page, re.DOTALL)
    shown = {"table": found[0]} if found else {}
    for figure in re.findall(r"<figure.*?</figure>", page, re.DOTALL):
        label = re.search(r'aria-label="([^"]+)"', figure)
        if label:
            shown[label[1]] = re.sub(r"<figcaption>.*?</figcaption>", "", figure, flags=re.DOTALL)
    return {name: f"{head}<body>{part}</body></html>" for name, part in shown.items()}


def photograph(browser: str, page: str, picture: Path, width: int) -> None:
    """Write what a browser shows of a page, without the empty space below and beside it.

    Args:
        browser: Its command.
        page: The page.
        picture: File to write.
        width: Of the window [pixels].
    """
    with tempfile.TemporaryDirectory() as folder:
        source, shot = Path(folder) / "page.html", Path(folder) / "shot.png"
        source.write_text(page, encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},{HEIGHT}"]
        command = [browser, *flags, f"--screenshot={shot}", source.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        image = Image.open(shot).convert("RGB")
    pixels = np.asarray(image)
    marked = (pixels != pixels[-1, -1]).any(axis=2)
    rows, columns = np.flatnonzero(marked.any(axis=1)), np.flatnonzero(marked.any(axis=0))
    right, bottom = min(image.width, int(columns[-1]) + 7), min(image.height, int(rows[-1]) + 7)
    box = (max(0, int(columns[0]) - 6), max(0, int(rows[0]) - 6), right, bottom)
    image.crop(box).quantize(COLOURS).save(picture, optimize=True)


def main() -> int:
    """Make them.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--report", type=Path, help="a report that is there, of adadagrad compare --data digits")
    given = parser.parse_args().report
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print("no chromium and no google-chrome on the path: install one of them", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        report = given or Path(folder) / "compare" / "report.html"
        if given is None:
            command = [sys.executable, "-m", "adadagrad", "compare", "--data", "digits", "--out", str(report.parent)]
            subprocess.run(command, check=True)
        pages = parts(report.read_text(encoding="utf-8"))
    for name, file in PARTS.items():
        photograph(browser, pages[name], PICTURES / file, TABLE_WIDTH if name == "table" else WIDTH)
        print(f"{file}: {(PICTURES / file).stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
