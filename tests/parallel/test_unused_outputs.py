"""Outputs that the loss leaves out, which DistributedDataParallel gives no gradient at all, not even zeros."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from adadagrad import AdaptiveBatch, Measure, NormTest
from adadagrad.statistics import MicroBatch, PerExample
from adadagrad.statistics.base import AbstractEstimator


class TwoHeads(nn.Module):
    """A regression with a second output, as models of transformers have that return logits beside their loss."""

    def __init__(self, gains: bool) -> None:
        super().__init__()
        self.head, self.other = nn.Linear(3, 1), nn.Linear(3, 2)
        self.gain = nn.Parameter(torch.ones(3)) if gains else 1.0
        self.other_gain = nn.Parameter(torch.ones(2)) if gains else 1.0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"wanted": self.head(x * self.gain), "other": self.other(x) * self.other_gain}


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def noise(wrap: bool, gains: bool, estimator: AbstractEstimator) -> list[float]:
    """The variance that each measured step has found."""
    torch.manual_seed(0)
    x = torch.randn(40, 3)
    model = TwoHeads(gains)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if wrap else model
    engine = AdaptiveBatch(
        wrapped,
        torch.optim.SGD(model.parameters(), lr=0.1),
        TensorDataset(x, x.sum(1, keepdim=True)),
        NormTest(eta=0.5),
        measure=Measure(every=1, estimator=estimator),
        global_batch_size=8,
        max_batch_size=16,
        epochs=1,
    )
    found = []
    for step in engine:
        step.run(lambda batch: (wrapped(batch[0])["wanted"] - batch[1]).square().mean())
        seen = step.update().observation.gradient
        if seen is not None:
            found.append(seen.variance_trace)
    return found


@pytest.mark.filterwarnings("ignore:.*no rule counts this gradient")
@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("gains", [False, True], ids=["layers", "layers and gains"])
@pytest.mark.parametrize("estimator", [PerExample(), MicroBatch()], ids=["examples", "micro-batches"])
def test_they_count_nothing(gains: bool, estimator: AbstractEstimator) -> None:
    measured = noise(True, gains, estimator)
    assert measured
    assert measured == pytest.approx(noise(False, gains, estimator), rel=1e-6)
