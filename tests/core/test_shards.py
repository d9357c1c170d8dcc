"""Norms and inner products of tensors that lie in shards on several ranks are those of the whole tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.shards import EVERYWHERE, is_sharded, local_part, place_of
from adadagrad.core.vectors import inner_product, quick_norm, squared_norm
from tests.ranks import on_ranks

SHAPES = ((3, 5), (1,), (7,), (2, 3, 2), (1, 300))
"""Fewer rows than ranks, uneven shares, and ranks without any row."""


def values(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def of_rank(rank: int, ranks: int) -> Any:
    line = init_device_mesh("cpu", (ranks,))
    meshes = [(line, [Shard(0)]), (line, [Replicate()])]
    if ranks == 4:
        square = init_device_mesh("cpu", (2, 2))
        meshes += [(square, [Replicate(), Shard(0)]), (square, [Shard(0), Shard(0)])]
    found = []
    for mesh, placements in meshes:
        left, right = ([distribute_tensor(t, mesh, placements) for t in values(seed)] for seed in (0, 1))
        mixed = [*left[:3], *values(0)[3:]]
        other = [*right[:3], *values(1)[3:]]
        found.append([
            [float(squared_norm(left)), quick_norm(left) ** 2, float(inner_product(left, right))],
            [float(squared_norm(mixed)), quick_norm(mixed) ** 2, float(inner_product(mixed, other))],
        ])
    cut = distribute_tensor(values(0)[0], line, [Shard(0)])
    local_part(cut).mul_(2)  # in its storage
    scaled = cut.full_tensor()
    bad = distribute_tensor(torch.ones(ranks, 2), line, [Shard(0)])
    local_part(bad).mul_(math.nan if rank == ranks - 1 else 1.0)
    unfinished = torch.distributed.tensor.DTensor.from_local(torch.ones(2), line, [Partial()])
    for function in (squared_norm, quick_norm, lambda x: inner_product(x, x)):
        with pytest.raises(InvalidArgument, match="holds addends"):
            function([unfinished])
    with pytest.raises(InvalidArgument, match="in the same way"):
        inner_product([cut], [torch.ones(3, 5)])
    assert is_sharded(cut)
    assert not is_sharded(torch.ones(2))
    assert place_of(torch.ones(2)) == EVERYWHERE
    assert dist.is_initialized()
    return found, scaled, math.isnan(quick_norm([bad])), math.isnan(float(squared_norm([bad])))


@pytest.mark.parametrize("ranks", [2, 4])
def test_sums_over_shards(ranks: int) -> None:
    results = on_ranks(ranks, of_rank, ranks)
    left, right = values(0), values(1)
    square = sum(float(t.square().sum()) for t in left)
    product = sum(float((a * b).sum()) for a, b in zip(left, right, strict=True))
    for found, scaled, *nan in results:
        assert found == results[0][0]
        for ways in found:
            for numbers in ways:
                assert numbers == pytest.approx([square, square, product], rel=1e-13)
        assert torch.equal(scaled, 2 * left[0])
        assert nan == [True, True]
