r"""What becomes of moments when the subspace that they live in is changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def transfer(
    state: dict[str, Any], change: Tensor, second_moment_map: str, betas: tuple[float, float], step: int
) -> None:
    r"""Carry moments from one basis to another.

    .. math:: M \leftarrow R M, \qquad V \leftarrow (R \circ R) V \quad \text{or} \quad
        (R \circ R) (\hat V - \hat M^2) + (R \hat M)^2, \qquad R = Q_{new}^\top Q_{old}

    R o R is exact for coordinates that are uncorrelated, and never makes V negative; its rows sum to at most 1. R
    itself, as printed in the paper, does make it negative. What lies outside the new subspace is lost.

    Args:
        state: Of a parameter: ``exp_avg`` and ``exp_avg_sq``, or ``momentum_buffer``, of shape (old rank, n).
        change: R, (new rank, old rank).
        second_moment_map: ``"squared"``, ``"ldadam"``, or ``"none"`` to leave the numbers where they are.
        betas: Of the moments, for the hats: bias-corrected values.
        step: Steps that the moments have seen.
    """
    rank = change.shape[0]
    if second_moment_map == "none":
        for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            if name in state:
                state[name] = _resized(state[name], rank)
        return
    if "momentum_buffer" in state:
        state["momentum_buffer"] = change @ state["momentum_buffer"]
        return
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    squared = change.square()
    if second_moment_map == "squared":
        state["exp_avg_sq"] = squared @ square
    else:
        bias1, bias2 = (1 - beta**step for beta in betas)
        hat = mean / bias1
        moved = squared @ (square / bias2 - hat.square()) + (change @ hat).square()
        state["exp_avg_sq"] = moved.clamp_(min=0).mul_(bias2)
    state["exp_avg"] = change @ mean


def _resized(moment: Tensor, rank: int) -> Tensor:
    """Return the first rows, or the rows with zeros below."""
    if rank <= moment.shape[0]:
        return moment[:rank].clone()
    return torch.cat([moment, moment.new_zeros(rank - moment.shape[0], moment.shape[1])])
