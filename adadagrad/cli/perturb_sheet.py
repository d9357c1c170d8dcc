"""The page of ``adadagrad perturb``: the perturbation as a picture, what it does to images, and the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from adadagrad.apps.universal_perturbation import Perturbation, RobustnessReport
from adadagrad.report.sheet import Image, Picture, Sheet
from adadagrad.report.table import Table

SHOWN = 8
"""Images in a row of the page."""
LIMITS = (
    "A lower bound of the vulnerability: another search may find a worse perturbation, and none is a certificate of "
    "safety. The row of random signs says what a change of this size does by itself."
)


def perturb_sheet(
    model: nn.Module,
    perturbation: Perturbation,
    report: RobustnessReport,
    transfer: Mapping[str, RobustnessReport],
    images: Sequence[Tensor],
) -> Sheet:
    """Return what the page holds, but for the settings.

    Args:
        model: Under test, in evaluation mode.
        perturbation: What was found.
        report: Of the model.
        transfer: Of other models, by name.
        images: Some to show, (C, H, W) in [0, 1].

    Returns:
        The sheet.
    """
    rows = {perturbation.method: report, **{f"{perturbation.method} on {name}": one for name, one in transfer.items()}}
    cells = []
    for name, one in rows.items():
        cells.append([name, *_numbers(one)])
        if one.random_sign is not None:
            cells.append([name.replace(perturbation.method, "random signs", 1), *_numbers(one.random_sign)])
    heads = ["perturbation", "clean accuracy", "accuracy under it", "fooling ratio", "fooling rate", "dominant class"]
    numbers = Table(headings=heads, cells=cells, notes=[
        "The fooling ratio is the share of predictions that change; the fooling rate is 1 less the accuracy under it.",
        LIMITS,
    ])  # fmt: skip
    classes = Table(
        headings=["class", "images", "clean accuracy", "accuracy under it", "fooling ratio"],
        cells=[
            [
                str(one.label),
                str(one.count),
                *map(_percent, (one.clean_accuracy, one.adversarial_accuracy, one.fooling_ratio)),
            ]
            for one in report.per_class
        ],
        notes=[],
    )
    return Sheet(
        title="Robustness to one perturbation of all inputs",
        sentences=[
            f"Of {report.n_samples:,} images the model classifies {_percent(report.clean_accuracy)} rightly, and "
            f"{_percent(report.adversarial_accuracy)} once a perturbation of at most {report.eps:g} is added to each: "
            f"{_percent(report.fooling_ratio)} of its predictions change. The search took "
            f"{report.gradient_count:,} gradients of single images."
        ],
        tables=[("What the perturbation does", numbers), ("By class", classes)],
        figures=_pictures(model, perturbation, images),
    )


def _pictures(model: nn.Module, perturbation: Perturbation, images: Sequence[Tensor]) -> list[Picture]:
    """The perturbation enlarged to its whole range, and images without and with it, with what the model says."""
    clean = torch.stack(list(images)).float()
    changed = perturbation.apply(clean.to(perturbation.delta.dtype)).float()
    like = next(model.parameters(), clean)
    with torch.no_grad():
        before, after = (model(some.to(like.device, like.dtype)).argmax(1).tolist() for some in (clean, changed))
    moved = [place for place, (one, two) in enumerate(zip(before, after, strict=True)) if one != two]
    kept = [place for place in range(len(before)) if place not in moved]
    half = min(SHOWN // 2, len(moved))
    shown = [*moved[:half], *kept[: SHOWN - half]]
    pairs = [(f"says {before[place]}", _pixels(clean[place])) for place in shown]
    pairs += [(f"says {after[place]}", _pixels(changed[place])) for place in shown]
    eps = max(perturbation.eps, 1e-12)
    delta = perturbation.delta.float()
    grey = delta.shape[0] != 3
    channels = [(f"channel {number}", one.tolist()) for number, one in enumerate(delta)] if grey else []
    return [
        Picture(
            name="perturbation",
            title="The perturbation",
            reading=f"Enlarged to its whole range: {'blue' if grey else 'dark'} is -{perturbation.eps:g}, "
            f"{'red' if grey else 'bright'} +{perturbation.eps:g}.",
            images=channels or [("all channels", _pixels(delta))],
            limits=(-eps, eps),
            signed=grey,
        ),
        Picture(
            name="images",
            title="Images without it and with it",
            reading="Held-out images, with what the model says of them; below, the same with the perturbation. Those "
            "of which it says something else come first, half of the row at most.",
            images=pairs,
        ),
    ]


def _pixels(image: Tensor) -> Image:
    """Rows of three colours where there are three channels, else of the first one's values."""
    found: Image = image.permute(1, 2, 0).tolist() if image.shape[0] == 3 else image[0].tolist()
    return found


def _numbers(report: RobustnessReport) -> list[str]:
    values = (report.clean_accuracy, report.adversarial_accuracy, report.fooling_ratio, report.fooling_rate)
    return [*map(_percent, values), f"{report.dominant_class} ({_percent(report.dominant_share)})"]


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
