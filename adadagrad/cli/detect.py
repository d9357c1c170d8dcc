"""``adadagrad detect``: detectors whose loss on small objects chooses how the next batch is composed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adadagrad.apps.dynamic_scale import (
    AbstractScalePolicy,
    AlwaysStitch,
    LossShareFeedback,
    NeverStitch,
    RandomPolicy,
    ScaleBatcher,
    ThresholdPolicy,
)
from adadagrad.apps.dynamic_scale.detector import GridDetector
from adadagrad.apps.dynamic_scale.scenes import SMALL_AREA, DigitScenes
from adadagrad.apps.dynamic_scale.training import evaluate_detector, stack_images, train_detector
from adadagrad.cli.arguments import read_flags
from adadagrad.cli.detect_sheet import detect_sheet
from adadagrad.cli.directory import new_directory, remove_if_empty
from adadagrad.cli.interrupt import Interrupt
from adadagrad.cli.outcome import check_seed, choices, in_flags_of, refuse_unread, write_outcome
from adadagrad.cli.progress import progress_display
from adadagrad.core.checks import check_at_least, check_below_one, check_fraction, check_integer, check_positive
from adadagrad.core.errors import InvalidArgument, MissingExtra, NonFiniteGradient, UnknownName

POLICIES = ("never", "threshold", "smoothed", "random", "always")
HIGHEST_RATE = 1e6
CROPPED = 1400
"""Digits of which training scenes are made; the other 397 make the test's."""


@dataclass(frozen=True, kw_only=True)
class SceneOptions:
    """Scenes of scikit-learn's digits, 64 x 64 pixels, one to three digits each.

    Args:
        scenes: Training scenes.
        small_scenes: Share of the training scenes that hold small digits (8 to 14 pixels; the others 22 to 32).
        test_scenes: Scenes to test on, half of them with small digits, made of other digits.
    """

    scenes: int = 1000
    small_scenes: float = 0.1
    test_scenes: int = 400


@dataclass(frozen=True, kw_only=True)
class StitchOptions:
    """When the next batch is made of shrunk scenes, four in the place of one.

    Args:
        policies: Each trains a detector: never, threshold (share of loss on small objects below tau), smoothed (the
            same with an averaged share), random (at p), always.
        tau: Share of the box loss on small objects below which to stitch [threshold, smoothed].
        ema: Weight of the past in the share [smoothed].
        p: Probability [random, which is trained last]; without it the share that the threshold came to, or 0.5.
    """

    policies: tuple[str, ...] = ("never", "threshold", "random")
    tau: float = 0.1
    ema: float = 0.9
    p: float | None = None


@dataclass(frozen=True, kw_only=True)
class DetectRun:
    """How long, and where results go.

    Args:
        steps: Training steps of each detector.
        batch: Scenes in a regular batch; a stitched one reads four times as many.
        lr: Learning rate of Adam at the start; it falls to 0 as a cosine.
        seed: Of scenes, weights and order.
        out: Directory to make; without it a numbered one under runs/.
    """

    steps: int = 300
    batch: int = 8
    lr: float = 2e-3
    seed: int = 0
    out: Path | None = None


@dataclass(frozen=True, kw_only=True)
class DetectCommand:
    """Train small detectors on scenes of digits, and compare policies that choose how the next batch is composed.

    Reports the average precision for small and large objects, the share of batches that were stitched, and the images
    read, which a stitched batch has four times as many of.
    """

    scenes: SceneOptions = field(default_factory=SceneOptions)
    stitch: StitchOptions = field(default_factory=StitchOptions)
    run: DetectRun = field(default_factory=DetectRun)


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Args:
        arguments: What follows ``detect``.

    Returns:
        The exit status: 0, or 130 after Ctrl-C or SIGTERM.
    """
    command = read_flags("detect", DetectCommand(), arguments)
    with in_flags_of(command):
        check(command)
        _refuse_unused(command, arguments)
        train, test = scenes_of(command)
    directory = new_directory(command.run.out, "detect")
    rows: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    try:
        with Interrupt() as interrupt:
            for name in sorted(command.stitch.policies, key=lambda policy: policy == "random"):
                steps = _train(command, name, results, train, test, interrupt)
                rows += [{"policy": name, **row} for row in steps]
                if interrupt.requested:
                    break
        results.sort(key=lambda one: command.stitch.policies.index(one["policy"]))
        for one in results:
            print(
                f"{one['policy']:<10} AP small {one['small']:.3f}, AP large {one['large']:.3f}, stitched "
                f"{one['stitched']:.2f}, images read {one['images']:,}"
            )
        if rows:
            write_outcome(directory, command, rows, detect_sheet(results, rows, choices(command)))
    finally:
        remove_if_empty(directory)
    return 130 if interrupt.requested else 0


def check(command: DetectCommand) -> None:
    """Refuse what is out of range, before scenes are made.

    Args:
        command: What the user chose.

    Raises:
        UnknownName: There is no such policy.
        InvalidArgument: An option is out of its range, or a policy is named twice or none is.
    """
    stitch, run = command.stitch, command.run
    for name in stitch.policies:
        if name not in POLICIES:
            raise UnknownName("policies", name, POLICIES)
    if not stitch.policies or len(set(stitch.policies)) < len(stitch.policies):
        raise InvalidArgument(f"policies must be different ones, at least one, got {' '.join(stitch.policies)!r}")
    check_at_least(0, tau=stitch.tau)
    check_below_one(ema=stitch.ema)
    if stitch.p is not None:
        check_fraction(p=stitch.p)
    check_integer(1, steps=run.steps, batch=run.batch, scenes=command.scenes.scenes)
    check_integer(2, test_scenes=command.scenes.test_scenes)
    check_seed(run.seed)
    check_positive(lr=run.lr)
    check_fraction(small_scenes=command.scenes.small_scenes)
    if run.lr > HIGHEST_RATE:
        raise InvalidArgument(f"lr must be at most {HIGHEST_RATE:g}, got {run.lr}")
    if 4 * run.batch > command.scenes.scenes:
        raise InvalidArgument(
            f"batch must be at most a quarter of the scenes, got {run.batch} of {command.scenes.scenes}: a stitched "
            "batch reads four times as many"
        )


def scenes_of(command: DetectCommand) -> tuple[DigitScenes, DigitScenes]:
    """Make the scenes, those of the test from other digits than those of the training.

    Args:
        command: What the user chose.

    Returns:
        Training and test scenes.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra("scikit-learn", "cli") from error
    data = load_digits()
    digits, labels = torch.tensor(data.images).float() / 16, torch.tensor(data.target)
    options, seed = command.scenes, command.run.seed
    train = DigitScenes(digits[:CROPPED], labels[:CROPPED], options.scenes, options.small_scenes, seed=1000 + seed)
    return train, DigitScenes(digits[CROPPED:], labels[CROPPED:], options.test_scenes, 0.5, seed=2000 + seed)


def _train(
    command: DetectCommand,
    name: str,
    results: list[dict[str, Any]],
    train: DigitScenes,
    test: DigitScenes,
    interrupt: Interrupt,
) -> list[dict[str, Any]]:
    """Train and evaluate one detector; the result joins the others, and its steps come back."""
    run, stitch = command.run, command.stitch
    torch.manual_seed(run.seed)
    detector = GridDetector()
    feedback = LossShareFeedback(SMALL_AREA, stitch.ema if name == "smoothed" else 0.0)
    batcher = ScaleBatcher(train, run.batch, _policy(command, name, results), feedback, run.seed, collate=stack_images)
    progress, rows = progress_display(name, run.steps), []
    with closing(progress):
        for step in train_detector(detector, batcher, run.steps, lr=run.lr):
            rows.append({"step": step.step, "loss": step.loss, "share": step.share, "stitched": step.stitched})
            share = "-" if step.share is None else f"{step.share:.2f}"
            parts = [f"loss {step.loss:.3f}", f"share {share}", f"stitched {step.stitched_fraction:.2f}"]
            progress.show(step.step, parts)
            if not math.isfinite(step.loss):
                raise NonFiniteGradient(f"the loss of step {step.step} under {name} is not finite: lower --lr")
            if interrupt.requested:
                break
    small, large = evaluate_detector(detector, test)
    results.append({
        "policy": name,
        "small": small,
        "large": large,
        "stitched": batcher.stitched_fraction,
        "images": batcher.images_read,
        "steps": len(rows),
    })  # fmt: skip
    return rows


def _refuse_unused(command: DetectCommand, arguments: Sequence[str]) -> None:
    """Refuse flags that change nothing beside the others."""
    chosen = set(command.stitch.policies)
    refuse_unread(
        arguments,
        {
            "tau": (bool(chosen & {"threshold", "smoothed"}), "--policies threshold or smoothed"),
            "ema": ("smoothed" in chosen, "--policies smoothed"),
            "p": ("random" in chosen, "--policies random"),
        },
    )


def _policy(command: DetectCommand, name: str, results: Sequence[dict[str, Any]]) -> AbstractScalePolicy:
    stitch = command.stitch
    if name == "random":
        matched = [one["stitched"] for one in results if one["policy"] in ("threshold", "smoothed")]
        p = stitch.p if stitch.p is not None else (matched[-1] if matched else 0.5)
        return RandomPolicy(p, command.run.seed)
    if name in ("threshold", "smoothed"):
        return ThresholdPolicy(stitch.tau)
    return AlwaysStitch() if name == "always" else NeverStitch()
