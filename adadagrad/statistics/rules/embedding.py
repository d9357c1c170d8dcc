r"""Embeddings: rows of the output gradient that meet at the same token add before they are squared.

The gradient of example i has row v = sum of B_i[t] over positions t with token v. Rows are added per
(example, token) pair, so no factor of the vocabulary enters: memory is that of the output gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from adadagrad.statistics.rules.base import AbstractRule
from adadagrad.statistics.rules.chunking import chunks, room
from adadagrad.statistics.rules.per_example_sums import products_per_example, squares_per_example


class EmbeddingRule(AbstractRule[nn.Embedding]):
    """Exact rule for `torch.nn.Embedding`; rows at `padding_idx` get no gradient and do not count."""

    def accepts(self, layer: nn.Embedding, x: Tensor, dims: tuple[int, int]) -> bool:
        """Return True: every position is looked up by itself."""
        return True

    def gradients(self, layer: nn.Embedding, x: Tensor, gy: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Return (n, vocabulary, features); large: used in chunks, for tied weights only."""
        n, tokens, rows = _rows(layer, x, gy)
        keys = torch.arange(n, device=x.device).repeat_interleave(tokens.shape[1]) * layer.num_embeddings
        flat = rows.new_zeros(n * layer.num_embeddings, layer.embedding_dim)
        flat.index_add_(0, keys + tokens.flatten(), rows.flatten(0, 1))
        return {"weight": flat.view(n, layer.num_embeddings, layer.embedding_dim)}

    def square_norms(self, layer: nn.Embedding, x: Tensor, gy: Tensor, names: Collection[str]) -> Tensor:
        """Return the norms from one sum per (example, token) pair that occurs."""
        examples, _, sums = _by_pair(layer, x, gy)
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        return total.index_add_(0, examples, squares_per_example(sums))

    def inner_products(self, layer: nn.Embedding, x: Tensor, gy: Tensor, directions: Mapping[str, Tensor]) -> Tensor:
        """Return <rows of the output gradient, the direction's rows at the same tokens>."""
        n, tokens, rows = _rows(layer, x, gy)
        if "weight" not in directions:
            return torch.zeros(n, dtype=torch.float64, device=x.device)
        return products_per_example(rows, directions["weight"][tokens])

    def square_sums(
        self, layer: nn.Embedding, x: Tensor, gy: Tensor, parameters: Mapping[str, Tensor], weights: Tensor
    ) -> dict[str, Tensor]:
        """Return the sums from the same pairs: each one's square goes to the row of its token."""
        sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
        examples, tokens, pairs = _by_pair(layer, x, gy)
        factors = weights[examples].unsqueeze(1)
        for part in chunks(len(pairs), layer.embedding_dim * factors.element_size(), room(factors)):
            squares = pairs[part].double().square().mul_(factors[part])
            for total in sums.values():
                total.index_add_(0, tokens[part], squares)
        return sums


def _by_pair(layer: nn.Embedding, x: Tensor, gy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the examples and tokens (m,) of all pairs that occur, and the gradient (m, features) of each."""
    n, tokens, rows = _rows(layer, x, gy)
    keys = torch.arange(n, device=x.device).repeat_interleave(tokens.shape[1]) * layer.num_embeddings
    pairs, where = torch.unique(keys + tokens.flatten(), return_inverse=True)
    sums = rows.new_zeros(len(pairs), layer.embedding_dim).index_add_(0, where, rows.flatten(0, 1))
    return pairs // layer.num_embeddings, pairs % layer.num_embeddings, sums


def _rows(layer: nn.Embedding, x: Tensor, gy: Tensor) -> tuple[int, Tensor, Tensor]:
    """Return n, tokens (n, T) and output gradients (n, T, features) with padding rows set to zero."""
    n = len(x)
    tokens = x.reshape(n, -1)
    rows = gy.reshape(n, -1, layer.embedding_dim)
    if layer.padding_idx is not None:
        rows = rows.masked_fill((tokens == layer.padding_idx).unsqueeze(-1), 0.0)
    return n, tokens, rows
