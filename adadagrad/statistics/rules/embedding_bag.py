r"""EmbeddingBag: the gradient of a bag goes to the rows of its tokens, scaled, as in an embedding.

With gy_i the gradient of bag i, the row of each of its tokens gets gy_i times the token's weight (1, a sample weight,
or 1 / number of tokens for the mean); rows at `padding_idx` get none, and are not in that number. What follows is an
embedding's rule: rows of the same token add before they are squared.

Cost per example: T p flop and a sort. Memory: T p numbers, T the tokens of the longest bag.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adadagrad.statistics.rules.embedding import EmbeddingRule
from adadagrad.statistics.rules.whole import AbstractWholeRule, Part, RecordedCall


class EmbeddingBagRule(AbstractWholeRule[nn.EmbeddingBag]):
    """Exact rule for `torch.nn.EmbeddingBag` with sums and means, two-dimensional tokens or offsets, sample weights.

    One bag an example, in the order of the examples. Not for ``max_norm``, which writes the weight in the forward.
    """

    def suits(self, layer: nn.EmbeddingBag) -> bool:
        """Return whether bags are sums or means."""
        return layer.mode in {"sum", "mean"}

    def may_draw(self, layer: nn.EmbeddingBag) -> bool:
        """Return False: it draws nothing."""
        return False

    def parts(self, call: RecordedCall, gradients: Sequence[Tensor | None], names: Collection[str]) -> list[Part]:
        """Return the call as an embedding of (n, T) tokens."""
        layer, (gy,) = call.layer, gradients
        assert isinstance(layer, nn.EmbeddingBag)
        args, kwargs = call.arguments
        given: list[Any] = [args[k] if k < len(args) else kwargs.get(name) for k, name in enumerate(_NAMES)]
        tokens, weights = _bags(layer, *given)
        if gy is None or call.output_dims[0] != 0 or len(gy) != len(tokens):
            raise ValueError("an example is not one bag")
        if layer.padding_idx is not None:
            weights = weights.masked_fill(tokens == layer.padding_idx, 0.0)
        if layer.mode == "mean":
            weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
        return [
            Part(EmbeddingRule(), tokens, gy.unsqueeze(1) * weights.to(gy.dtype).unsqueeze(2), {"weight": "weight"})
        ]


_NAMES = ("input", "offsets", "per_sample_weights")


def _bags(
    layer: nn.EmbeddingBag, tokens: Tensor, offsets: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return tokens and their weights (n, T); bags that are shorter than the longest have weight 0 at their end."""
    if weights is None:
        weights = torch.ones(tokens.shape, dtype=layer.weight.dtype, device=tokens.device)
    if offsets is None:
        return tokens, weights
    ends = offsets[1:] if layer.include_last_offset else torch.cat([offsets[1:], offsets.new_tensor([len(tokens)])])
    starts = offsets[: len(ends)]
    places = torch.arange(int((ends - starts).max()), device=offsets.device)
    inside = places < (ends - starts).unsqueeze(1)
    where = (starts.unsqueeze(1) + places).clamp(max=max(0, len(tokens) - 1))
    return tokens[where], weights[where] * inside
