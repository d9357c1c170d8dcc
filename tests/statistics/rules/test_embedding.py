"""Embeddings with a padding index: its row has no gradient, whatever arrives there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adadagrad.statistics.rules.embedding import EmbeddingRule
from tests.statistics.checking import floats

IDS = torch.tensor([[2, 2, 2, 2], [2, 0, 2, 1], [0, 0, 1, 2], [4, 3, 4, 4]])


@pytest.mark.parametrize("padding", [None, 2, -3, 0])
def test_all_numbers_are_those_of_autograd(padding: int | None) -> None:
    layer, gy = nn.Embedding(5, 3, padding_idx=padding).double(), floats(4, 4, 3)
    gradients = torch.stack([torch.autograd.grad(layer(x), layer.weight, g)[0] for x, g in zip(IDS, gy, strict=True)])
    direction, rule = floats(5, 3), EmbeddingRule()
    torch.testing.assert_close(rule.gradients(layer, IDS, gy, {"weight"})["weight"], gradients)
    torch.testing.assert_close(rule.square_norms(layer, IDS, gy, {"weight"}), gradients.square().sum((1, 2)))
    products = rule.inner_products(layer, IDS, gy, {"weight": direction})
    torch.testing.assert_close(products, (gradients * direction).sum((1, 2)))
    assert (gradients[0].norm() == 0) == (padding in (2, -3)), "the first example is nothing but token 2"
