"""A flag that the chosen policy, optimizer or schedule does not read is a mistake, not a wish to pass over.

Someone who writes ``--eta 0.1 --policy augmented`` believes that eta does something. Only flags are checked: a settings
file holds every value, used or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from adadagrad.cli.config import Settings
from adadagrad.core.errors import InvalidArgument

TESTS = ("norm", "inner-product", "augmented", "coordinate")
"""The paper's tests."""
SHRINKING = ("recommended", "noise-scale", "cabs")
"""Policies under which a batch may shrink."""
MEASURED = (*TESTS, *SHRINKING, "divebatch", "big-batch")
"""Policies that measure noise."""
GAINS = ("adascale", "adamscale", "accumulator")
"""Learning-rate rules that measure noise."""
RATES = (*GAINS, "linear", "sqrt", "legw", "seesaw")
"""Learning-rate rules whose base batch can be named."""
MEASURE = ("measure_every", "max_overhead", "max_examples")
"""Options of measuring."""

READERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "eta": ("policy", ("norm", "coordinate", "big-batch")),
    "theta": ("policy", ("inner-product", "augmented")),
    "nu": ("policy", ("augmented",)),
    "finite_population": ("policy", TESTS),
    "reduction": ("policy", ("coordinate",)),
    "quantile": ("reduction", ("quantile",)),
    "fraction": ("policy", ("noise-scale",)),
    "averaging": ("policy", ("noise-scale", "cabs")),
    "cabs_scale": ("policy", ("cabs",)),
    "loss_offset": ("policy", ("cabs",)),
    "delta": ("policy", ("divebatch",)),
    "stages": ("policy", ("staged",)),
    "plan": ("policy", ("recorded",)),
    "end_batch_size": ("policy", ("linear", "geometric")),
    "ramp_samples": ("policy", ("linear",)),
    "increment": ("policy", ("linear", "big-batch")),
    "factor": ("policy", ("geometric",)),
    "every_samples": ("policy", ("geometric",)),
    "global_batch_size": ("policy", (*MEASURED, "constant", "linear", "geometric")),
    "min_batch_size": ("policy", SHRINKING),
    "max_growth": ("policy", (*MEASURED, "staged", "linear", "geometric")),
    "on_infinite": ("policy", MEASURED),
    "confidence": ("policy", ("recommended", "norm", "noise-scale", "cabs", "big-batch")),
    "measure_every": ("policy", MEASURED),
    "max_overhead": ("measure_every", ("auto",)),
    "max_examples": ("policy", MEASURED),
    "base_batch_size": ("rate", RATES),
    "smoothing": ("rate", GAINS),
    "progress_in": ("rate", GAINS),
    "legw_epochs": ("rate", ("legw",)),
    "momentum": ("optimizer", ("sgd", "extrapolated-sgd")),
    "gamma": ("optimizer", ("mars", "mars-m")),
    "mars_variant": ("optimizer", ("mars",)),
    "mars_mode": ("optimizer", ("mars", "mars-m")),
    "max_rank": ("optimizer", ("adarankgrad",)),
    "sift_rate": ("optimizer", ("sift",)),
    "extrapolation": ("optimizer", ("extrapolated-sgd", "extrapolated-adam")),
    "perturb": ("optimizer", ("extrapolated-sgd",)),
    "power": ("optimizer", ("adagrad-ota", "adam-ota")),
    "warmup_samples": ("lr_schedule", ("cosine", "linear")),
    "lr_floor": ("lr_schedule", ("cosine", "linear")),
    "lr_milestones": ("lr_schedule", ("step",)),
}
"""For an option that not every run reads: the option that decides, and its values with which it is read."""


def refuse_unused(settings: Settings, arguments: Sequence[str], *, also: Sequence[str] = ()) -> None:
    """Refuse flags that change nothing beside the other choices.

    Args:
        settings: All choices, from the file and the flags.
        arguments: What the user typed.
        also: Options that the command reads whatever the choices are.

    Raises:
        InvalidArgument: A flag is not read; the message names it and what reads it.
    """
    typed = [word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")]
    chosen = {name: value for group in asdict(settings).values() for name, value in group.items()}
    for name in typed:
        decider, values = READERS.get(name, ("policy", ()))
        if name == "max_overhead" and chosen["measure_every"] == "auto":
            decider, values = "policy", MEASURED  # is anything measured at all?
        if name in also or (decider == "policy" and name in MEASURE and chosen["rate"] in GAINS):
            continue  # (the rate measures, whatever the policy does)
        if values and chosen[decider] not in values:
            flag, by = _flag(name), _flag(decider)
            raise InvalidArgument(
                f"{flag} is not used with {by} {chosen[decider]}: leave it out, or choose {by} {' or '.join(values)}"
            )
    if "epochs" in typed and chosen["samples"] is not None:
        raise InvalidArgument(
            f"--epochs is not used beside --samples {chosen['samples']}: give the budget as one of them; where the "
            "settings file says samples, give --samples"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
