"""What the library says of its arguments, said of the flags that were typed."""

from __future__ import annotations

import pytest

from adadagrad.cli.flags import flags_named, in_flags
from adadagrad.core.errors import InvalidArgument, UnknownName


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("eta must be > 0, got -1.0", "--eta must be > 0, got -1.0"),
        ("total_samples must be >= 1, got 0", "--samples must be >= 1, got 0"),
        ("floor must be between 0 and 1, got 2.0", "--lr-floor must be between 0 and 1, got 2.0"),
        (
            "end must be >= start, got end=8 and start=16: a smaller end",
            "--end-batch-size must be >= --global-batch-size, got --end-batch-size 8 and --global-batch-size 16: "
            "a smaller end",
        ),
        ("a factor in milestones must be >= 0, got -1.0", "a factor in --lr-milestones must be >= 0, got -1.0"),
        ("scale must be > 0, got 0.0", "--cabs-scale must be > 0, got 0.0"),
        ("base_warmup_epochs must be >= 0, got -1.0", "--legw-epochs must be >= 0, got -1.0"),
        ("averaging must be < 1, or None for each step by itself, got 1.0", "--averaging must be < 1, got 1.0"),
        ("got end=8 and increment=3: take end=7", "got --end-batch-size 8 and --increment 3: take --end-batch-size 7"),
        ('or pass on_nonfinite="skip" to go on', "or pass --on-nonfinite skip to go on"),
        ("max_growth must be > 1 (or None for no limit), got 1", "--max-growth must be > 1, got 1"),
        ("ConstantBatch(global_batch_size=8) starts at 8", "ConstantBatch(global_batch_size=8) starts at 8"),
        ("runs/max_batch_size/run.jsonl is not there", "runs/max_batch_size/run.jsonl is not there"),
        ("--max-batch-size is too large: fewer samples", "--max-batch-size is too large: fewer samples"),
    ],
)
def test_arguments_become_flags_and_words_stay_words(message: str, said: str) -> None:
    assert in_flags(message) == said


def test_the_error_keeps_its_class_and_can_be_renamed_for_one_place() -> None:
    with pytest.raises(UnknownName, match="known: hold"), flags_named():
        raise UnknownName("on_infinite", "stop", ["hold"])
    large = flags_named(global_batch_size="large-batch-size")
    with pytest.raises(InvalidArgument, match="--large-batch-size must be >= 1"), large:
        raise InvalidArgument("global_batch_size must be >= 1, got 0")
