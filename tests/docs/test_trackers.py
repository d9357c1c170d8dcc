"""docs/trackers.md and docs/watch.md: their Python runs, their commands and flags exist, and do what the text says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from adadagrad.cli import main
from adadagrad.cli.arguments import TrainCommand, parse
from adadagrad.cli.tracking import TRACKERS, check_trackers
from adadagrad.cli.watch import PORT
from tests.integrations.trackers import prometheus_values, tensorboard_rows

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def run(page: str) -> dict[str, object]:
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, f"docs/{page}", "exec"), names)
    return names


def test_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    names = run("trackers.md")
    rows = tensorboard_rows(Path("runs/one/tensorboard"))
    assert rows["adadagrad/global_batch_size"][-1][0] == 2000
    assert {"adadagrad/relative_variance", "adadagrad/threshold", "adadagrad/loss", "adadagrad/step"} <= set(rows)
    assert names["sent"] == len(rows["adadagrad/loss"])
    values = prometheus_values(Path("runs/one/metrics.prom").read_text())
    (example,) = blocks("trackers.md", "text")
    assert {line.split("{")[0] for line in example.splitlines()} <= {name for name, _ in values}
    assert values["adadagrad_samples_seen", (("run", "one"),)] == 2000


def test_its_table_names_every_tracker() -> None:
    text = (DOCS / "trackers.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `--track (\w+)` \| (\S+) \|", text, re.MULTILINE) == [
        (name, "none" if name == "prometheus" else f"`{name}`") for name in TRACKERS
    ]
    words = shlex.split(blocks("trackers.md", "sh")[0])
    assert words[:2] == ["adadagrad", "train"]
    check_trackers(parse("train", TrainCommand(), words[2:]).files.track)


def test_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jinja2")
    monkeypatch.chdir(tmp_path)
    assert str(run("watch.md")["address"]).startswith("http://127.0.0.1:")
    text = (DOCS / "watch.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["watch", "--help"])
    known = set(re.findall(r"--[a-z]+", capsys.readouterr().out))
    assert set(re.findall(r"`(--[a-z]+)", text)) == known - {"--help"}
    assert text.count(str(PORT)) == 4
    assert all(
        line.split("adadagrad ")[1].startswith("watch ") for line in "".join(blocks("watch.md", "sh")).splitlines()
    )


def test_its_picture_is_small() -> None:
    assert 20_000 < (DOCS / "pictures" / "watch.png").stat().st_size < 150_000
