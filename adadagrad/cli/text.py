"""How the progress line says a time and fits a terminal."""

from __future__ import annotations

import math


def fold(parts: list[str], width: int) -> str:
    r"""Put parts on as few lines as they need, without padding and without breaking one.

    Args:
        parts: Pieces of text, in order.
        width: Columns of a line; a part that is longer gets a line of its own.

    Returns:
        The lines.

    Example:
        >>> fold(["batch    16", "loss 0.5", "ETA 0:01"], width=18)
        'batch 16 loss 0.5\nETA 0:01'
    """
    lines: list[str] = []
    for part in (" ".join(part.split()) for part in parts):
        if lines and len(lines[-1]) + 1 + len(part) <= width:
            lines[-1] += f" {part}"
        else:
            lines.append(part)
    return "\n".join(lines)


def clock(seconds: float) -> str:
    """Write a time that is left.

    Args:
        seconds: At least 0; may be infinite.

    Returns:
        Minutes and seconds, hours where there are any.

    Example:
        >>> clock(75), clock(3700), clock(float("inf"))
        ('1:15', '1:01:40', '-')
    """
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
