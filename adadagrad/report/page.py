"""The report: one HTML file with table, figures and settings, which needs nothing outside itself."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path

from adadagrad.report.answers import answers
from adadagrad.report.plots import plots
from adadagrad.report.run import Run
from adadagrad.report.style import DARK, LIGHT
from adadagrad.report.table import comparison_table
from adadagrad.report.template import render


def report_html(runs: Sequence[Run], title: str | None = None) -> str:
    """Write the report of one or several runs as a page.

    Args:
        runs: At least one run, in the order of the table.
        title: Heading of the page; None names the runs.

    Returns:
        The page: no script, no external style, font or picture; legible in light and dark.

    Raises:
        MissingExtra: jinja2 or matplotlib is not installed.
    """
    return render(
        "page.html.j2",
        title=title or _title(runs),
        facts=_facts(runs),
        answers=[(run.name, found) for run in runs if (found := answers(run)) is not None],
        table=comparison_table(runs),
        figures=[(plot, plot.svg()) for plot in plots(runs)],
        runs=[(run, _settings(run)) for run in runs],
        light=LIGHT,
        dark=DARK,
    )


def write_report(runs: Sequence[Run], path: str | Path, title: str | None = None) -> Path:
    """Write the report to a file, whose folder is made where it is missing.

    Args:
        runs: At least one run.
        path: The HTML file; one that exists is replaced.
        title: Heading of the page; None names the runs.

    Returns:
        The path.
    """
    path = Path(path)
    page = report_html(runs, title)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _title(runs: Sequence[Run]) -> str:
    names = [run.name for run in runs]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _facts(runs: Sequence[Run]) -> str:
    """One line of what all the runs have in common, so that a page tells what was trained; what differs is left out."""
    words = {
        "dataset_size": "{:,} training examples",
        "parameters": "{:,} parameters",
        "optimizer": "optimizer {}",
        "total_samples": "a budget of {:,} samples",
        "seed": "seed {}",
    }
    problems = {_problem(run) for run in runs}
    facts = [*problems] if len(problems) == 1 and "" not in problems else []
    for key, text in words.items():
        values = [run.start.get(key) for run in runs]
        if all(isinstance(value, int | str) and value == values[0] for value in values):
            of_progress = " of progress" * (key == "total_samples" and any(run.counts_progress for run in runs))
            facts.append(text.format(values[0]) + of_progress)
    return ", ".join(facts)


def _problem(run: Run) -> str:
    """Model and data as the configuration beside the log names them; nothing where there is none, as in own scripts."""
    try:
        problem = tomllib.loads(run.config or "").get("problem", {})
        return f"{problem['model']} on {problem['data']}"
    except (tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError):
        return ""


def _settings(run: Run) -> list[tuple[str, str]]:
    """The start record in words, without what only a machine reads."""
    hidden = {"kind", "version", "time", "samples_seen"}
    return [(key.replace("_", " "), str(value)) for key, value in run.start.items() if key not in hidden]
