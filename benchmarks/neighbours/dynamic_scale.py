"""Dynamic scale training on scenes of digits, beside random stitching at the same share, never, and always.

    python -m benchmarks.neighbours.dynamic_scale [--seeds 5] [--jobs 1] [--feedback "threshold 0.1"]

1,000 scenes of 64 x 64 pixels to train on, of which 100 hold small digits (8 to 14 pixels), the others large ones (22
to 32); 400 scenes of other digits to test on, half and half. The detector has 102,341 parameters and is trained for 500
steps of 8 images. A digit is small below 16^2 square pixels, in what feeds back and in what is reported. A seed stands
for scenes, weights and order. Each feedback policy is followed by a random one whose probability is the share of
stitched batches that the feedback policy came to with the same seed; differences are paired over seeds. AP is at IoU
0.5, in percent. Beside them stands stitching every second batch. Nothing was tuned for any arm; the noise of the scenes
was chosen on another seed so that plain training has room to gain.

The thresholds without memory nearly alternate: a stitched batch of these scenes has r near 1, so no two follow each
other. With seed 0, tau = 0.3 leaves strict alternation at one of 500 steps, tau = 0.1 at 13. They differ from the
random policy in their even spacing more than in what they know of the loss.
"""

from __future__ import annotations

import argparse
import math
import time
from statistics import mean, stdev
from typing import Any

import torch
from sklearn.datasets import load_digits

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
from benchmarks.companions.kept import results, spread, table
from benchmarks.machine import machine, write_json

FEEDBACK: dict[str, dict[str, float]] = {
    "threshold 0.1": {"tau": 0.1, "ema": 0.0},
    "threshold 0.3": {"tau": 0.3, "ema": 0.0},
    "smoothed threshold 0.1": {"tau": 0.1, "ema": 0.9},
    "smoothed threshold 0.3": {"tau": 0.3, "ema": 0.9},
}
"""Policies with feedback: threshold, and the weight of the past in the share."""
HEADS = ["policy", "AP small", "AP large", "stitched", "steps with r < 0.1", "images read"]
TRAIN_SCENES, TEST_SCENES = 1000, 400
TRAIN_DIGITS = 1400
"""Digits of which training scenes are made; the other 397 make the test's."""


class Alternate(AbstractScalePolicy):
    """Stitch every second batch, from the first on, without looking at anything."""

    def decide(self, share: float | None, step: int) -> bool:
        """Return whether the step is even.

        Args:
            share: Not looked at.
            step: Steps taken so far.
        """
        return step % 2 == 0


def run(*, policy: str, tau: float, ema: float, p: float, seed: int, steps: int) -> dict[str, Any]:
    """Train and evaluate one detector.

    Args:
        policy: ``"never"``, ``"always"``, ``"alternate"``, ``"threshold"`` or ``"random"``.
        tau: Threshold.
        ema: Weight of the past in the share.
        p: Probability of the random policy.
        seed: Of scenes, weights and order.
        steps: Of training.
    """
    begin = time.perf_counter()
    data = load_digits()
    digits, labels = torch.tensor(data.images).float() / 16, torch.tensor(data.target)
    train = DigitScenes(digits[:TRAIN_DIGITS], labels[:TRAIN_DIGITS], TRAIN_SCENES, 0.1, seed=1000 + seed)
    test = DigitScenes(digits[TRAIN_DIGITS:], labels[TRAIN_DIGITS:], TEST_SCENES, 0.5, seed=2000 + seed)
    torch.manual_seed(seed)
    detector = GridDetector()
    choices: dict[str, AbstractScalePolicy] = {
        "never": NeverStitch(),
        "always": AlwaysStitch(),
        "alternate": Alternate(),
        "threshold": ThresholdPolicy(tau),
        "random": RandomPolicy(p, seed),
    }
    feedback = LossShareFeedback(SMALL_AREA, ema)
    batcher = ScaleBatcher(train, 8, choices[policy], feedback, seed, collate=stack_images)
    record = list(train_detector(detector, batcher, steps))
    small, large = evaluate_detector(detector, test)
    starved = [step.share < 0.1 for step in record if step.share is not None]
    return {
        "small": small,
        "large": large,
        "stitched": batcher.stitched_fraction,
        "starved": mean(starved),
        "images": batcher.images_read,
        "seconds": time.perf_counter() - begin,
    }


def study(
    seeds: int, steps: int, jobs: int, names: list[str]
) -> tuple[list[list[str]], list[list[str]], dict[str, Any]]:
    """Run all policies.

    Args:
        seeds: How many.
        steps: Of training.
        jobs: Processes.
        names: Keys of `FEEDBACK`.

    Returns:
        The rows of the table of policies, those of the table of differences, and all results by policy.
    """
    plain = {"tau": 0.0, "ema": 0.0, "p": 0.0, "steps": steps}
    arms: dict[str, list[dict[str, Any]]] = {}
    for policy in ("never", "alternate", "always"):
        arms[policy] = [{**plain, "policy": policy, "seed": seed} for seed in range(seeds)]
    for name in names:
        arms[name] = [{**plain, **FEEDBACK[name], "policy": "threshold", "seed": seed} for seed in range(seeds)]
    found = {name: results("dynamic_scale", run, wanted, jobs) for name, wanted in arms.items()}
    for name in names:
        wanted = [{**plain, "policy": "random", "p": one["stitched"], "seed": one["seed"]} for one in found[name]]
        found[f"random, share of {name}"] = results("dynamic_scale", run, wanted, jobs)
    order = ["never"]
    for name in names:
        order += [name, f"random, share of {name}"]
    order += ["alternate", "always"]
    rows = [_row(name, found[name]) for name in order]
    differences = []
    for name in names:
        for other in (f"random, share of {name}", "alternate"):
            differences.append(_difference(name, found[name], other.partition(",")[0], found[other]))
    return rows, differences, {name: found[name] for name in order}


def _row(name: str, runs: list[dict[str, Any]]) -> list[str]:
    percents = [spread([100 * one[key] for one in runs], 1) for key in ("small", "large")]
    shares = [spread([one[key] for one in runs], 2) for key in ("stitched", "starved")]
    return [name, *percents, *shares, f"{mean(one['images'] for one in runs):,.0f}"]


def _difference(name: str, own: list[dict[str, Any]], rival: str, other: list[dict[str, Any]]) -> list[str]:
    """Return mean, standard deviation and t of the paired differences, for small and for large objects."""
    cells = [f"{name} minus {rival}"]
    for key in ("small", "large"):
        differences = [100 * (a[key] - b[key]) for a, b in zip(own, other, strict=True)]
        deviation = stdev(differences) if len(differences) > 1 else 0.0
        t = mean(differences) / (deviation / math.sqrt(len(differences))) if deviation > 0 else math.nan
        cells += [f"{mean(differences):+.1f} ± {deviation:.1f}", f"{t:.1f}"]
    return cells


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--feedback", nargs="+", default=list(FEEDBACK), choices=list(FEEDBACK))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows, differences, found = study(chosen.seeds, chosen.steps, chosen.jobs, chosen.feedback)
    write_json("neighbours/dynamic_scale", {"runs": found})
    print(table(HEADS, rows))
    print()
    print(table(["difference", "AP small", "t", "AP large", f"t ({chosen.seeds} pairs)"], differences))
    seconds = max(one["seconds"] for runs in found.values() for one in runs)
    print(f"\n{machine()}; the slowest run took {seconds:.0f} s")


if __name__ == "__main__":
    main()
