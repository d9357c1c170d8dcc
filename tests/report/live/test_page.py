"""The page in a real browser: it shows the last numbers, draws them, and follows a run without being loaded again."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from adadagrad.report.live.server import LiveServer
from adadagrad.report.live.view import LiveView
from adadagrad.report.style import DARK, LIGHT
from tests.report.logs import end, log, long_run, small_run, start, step, write

pytest.importorskip("jinja2")
FOUND = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")]
BROWSER = next((path for path in FOUND if path), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
DARK_SCHEME = "--blink-settings=preferredColorScheme=0"


class WritingView(LiveView):
    """Writes a line of the run whenever a page asks: so each look of one and the same page finds more."""

    def __init__(self, directory: Path, records: list[dict[str, Any]]) -> None:
        super().__init__(directory)
        self.left, self.asked = list(records), 0

    def news(self, since: str = "") -> bytes:
        self.asked += 1
        if self.left:
            with (self.directory / "run.jsonl").open("a") as file:
                file.write(json.dumps(self.left.pop(0)) + "\n")
        return super().news(since)


@contextmanager
def serving(directory: Path, view: LiveView | None = None) -> Iterator[str]:
    with LiveServer(directory) as server:
        server.view = view or server.view
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server.url
        server.shutdown()
        thread.join()


def browse(url: str, profile: Path, *options: str, seconds: float = 2.5) -> str:
    """Open a page for some seconds of its own clock; nothing may be refused by its policy or fail in its script."""
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
        f"--user-data-dir={profile}", f"--virtual-time-budget={int(1000 * seconds)}", *options, url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    for word in ("CONSOLE", "Refused to", "Uncaught"):
        assert word not in done.stderr
    return done.stdout


def shown(dom: str) -> list[str]:
    """What a reader sees: the text of the document, without its script and style."""
    body = re.sub(r"<(script|style)>.*?</\1>", "", dom[dom.index("<body>") :], flags=re.DOTALL)
    body = re.sub(r"<(\w+)[^>]* hidden=\"\"[^>]*>.*?</\1>", "", body, flags=re.DOTALL)
    return [text.strip() for text in re.split(r"<[^>]+>", body) if text.strip()]


def test_it_waits_for_a_run_and_says_so(tmp_path: Path) -> None:
    with serving(tmp_path / "run") as url:
        text = shown(browse(url, tmp_path / "profile", "--dump-dom"))
    assert "waiting for a run" in text
    assert "No run here yet." in text
    assert "batch size" not in text


def test_it_shows_the_last_values_of_a_run(tmp_path: Path) -> None:
    write(tmp_path / "run", small_run())
    with serving(tmp_path / "run") as url:
        dom = browse(url, tmp_path / "profile", "--dump-dom")
    text = shown(dom)
    for name, value in (("batch size", "32"), ("validation accuracy", "0.6250"), ("learning rate", "0.1")):
        assert text[text.index(name) + 1] == value
    assert text[text.index("samples seen") + 1 :][:2] == ["96", "4 steps"]
    assert "best 0.7500" in text
    assert "finished" in text
    assert text[text.index("The two sides of the test") + 1 :][:4] == ["measured", "0.5", "threshold", "0.25"]
    titles = re.findall(r"<h2>([^<]*)</h2>", dom)
    assert titles == [
        "Batch size", "The two sides of the test", "Training loss", "Validation accuracy", "Learning rate",
        "Throughput",
    ]  # fmt: skip
    assert dom.count("<svg") == 6
    assert "NaN" not in re.sub(r"<script>.*?</script>", "", dom, flags=re.DOTALL)


def test_it_follows_a_run_without_being_loaded_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    records = [start(total_samples=640), step(1, 16, 16)]
    more = [
        step(2, 48, 32),
        log(2, 48, 0.5),
        step(3, 112, 64, loss="nan"),
        log(3, 112, 0.875),
        step(4, 240, 128, loss=0.3),
    ]
    write(run, records)
    view = WritingView(run, more)
    with serving(run, view) as url:
        text = shown(browse(url, tmp_path / "profile", "--dump-dom", seconds=8.5))
    assert view.left == []
    assert view.asked >= 6
    assert text[text.index("batch size") + 1] == "128"
    assert text[text.index("validation accuracy") + 1] == "0.8750"
    assert text[text.index("samples seen") + 1] == "240"
    assert text[text.index("training loss") + 1] == "0.3"
    assert any(word.startswith("running") for word in text)


def test_a_log_that_is_cut_back_while_the_page_is_open(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run, [start(), *(step(n, 16 * n, 16) for n in range(1, 6))])

    class Cut(LiveView):
        asked = 0

        def news(self, since: str = "") -> bytes:
            self.asked += 1
            if self.asked == 3:
                write(run, [start(), step(1, 16, 16), step(2, 24, 8)])
            return super().news(since)

    with serving(run, Cut(run)) as url:
        text = shown(browse(url, tmp_path / "profile", "--dump-dom", seconds=5))
    assert text[text.index("samples seen") + 1 :][:2] == ["24", "2 steps"]
    assert text[text.index("batch size") + 1] == "8"


def test_runs_of_a_folder_stand_in_one_table(tmp_path: Path) -> None:
    for size, eta in ((16, None), (512, None), (32, 0.5)):
        write(tmp_path / "runs" / f"run-{size}", long_run(size, total=20_000, eta=eta))
    with serving(tmp_path / "runs") as url:
        dom = browse(url, tmp_path / "profile", "--dump-dom")
    text = shown(dom)
    assert {"run-16", "run-512", "run-32"} <= set(text)
    assert text.count("100%") == 3
    assert dom.count("<tr>") == 4


@pytest.mark.parametrize(
    ("options", "page", "colors"), [((), "#ffffff", LIGHT), ((DARK_SCHEME,), "#14171c", DARK)], ids=["light", "dark"]
)
@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_drawn(tmp_path: Path, options: tuple[str, ...], page: str, colors: tuple[str, ...], width: int) -> None:
    image = pytest.importorskip("matplotlib.image")
    run = tmp_path / "run"
    records = [record for record in long_run(32, total=20_000, eta=0.5) if record["kind"] != "end"]
    write(run, records)
    picture = tmp_path / "shot.png"
    with serving(run) as url:
        browse(url, tmp_path / "profile", *options, f"--window-size={width},1500", f"--screenshot={picture}")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = (255 * image.imread(picture)[:, :, :3]).round().astype(int)
    assert pixels.shape == (1500, width, 3)
    assert "#{:02x}{:02x}{:02x}".format(*pixels[2, 2]) == page
    wanted = [int(colors[0][place : place + 2], 16) for place in (1, 3, 5)]
    assert (abs(pixels - wanted).max(axis=2) <= 2).sum() > 500  # the curves
    assert len({tuple(pixel) for row in pixels[::3] for pixel in row}) > 100


def test_end_is_a_state_that_a_resumed_run_leaves(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run, [start(), step(1, 16, 16), end(1, 16)])
    with serving(run, WritingView(run, [step(2, 32, 16)])) as url:
        assert any(word.startswith("running") for word in shown(browse(url, tmp_path / "profile", "--dump-dom")))
