"""Measuring for long leaves no object and no memory behind: 300 steps, or 10,000 with ADADAGRAD_SLOW=1.

What costs more has a third or a fifth of that.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adadagrad as ada
from adadagrad.core.reduction import CoordinateReduction
from adadagrad.statistics import GradientMeter, MicroBatch, PerExample
from tests.statistics.checking import Composite

STEPS = 10_000 if os.environ.get("ADADAGRAD_SLOW") == "1" else 300
PAGES = Path("/proc/self/statm")
MEGABYTE = 2**20


pytestmark = pytest.mark.timeout(1200)


def forward(m: nn.Module, x: Tensor) -> Tensor:
    """Fused layers, a table, a tied weight; and what is there of a layer seen whole and of a gain that needs reruns."""
    h = m.norm(m.tokens(x) + m.table)
    h = h + torch.tanh(m.layer(h))
    if "recurrent" in m._modules:
        h = m.recurrent(h)[0]
    if "gain" in m._parameters:
        h = h * m.gain
    return m.head(F.relu(h, inplace=True)).transpose(1, 2)


def network(**more: nn.Module | nn.Parameter) -> nn.Module:
    torch.manual_seed(4)
    parts = {
        "tokens": nn.Embedding(9, 6),
        "table": nn.Parameter(torch.randn(5, 6)),
        "norm": nn.LayerNorm(6),
        "layer": nn.Linear(6, 6),
        "head": nn.Linear(6, 9, bias=False),
    }
    model = Composite(forward, **parts, **more)
    model.head.weight = model.tokens.weight
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "rules": (network, STEPS),
    "seen whole": (lambda: network(recurrent=nn.GRU(6, 6, batch_first=True)), STEPS // 5),
    "rerun": (lambda: network(gain=nn.Parameter(torch.ones(6))), STEPS // 5),
}


def resident() -> float:
    """Memory of this process in MiB."""
    return int(PAGES.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MEGABYTE


def growth(step: Callable[[int], None], steps: int) -> tuple[int, float]:
    """Objects and MiB that the second half of the steps has left behind beside the first."""
    half, found = steps // 2, []
    for k in range(steps):
        step(k)
        if k + 1 in {half, steps}:
            gc.collect()
            found.append((len(gc.get_objects()), resident()))
    return found[1][0] - found[0][0], found[1][1] - found[0][1]


@pytest.mark.skipif(not PAGES.exists(), reason="reads /proc")
@pytest.mark.filterwarnings("ignore:.*no rule counts")
@pytest.mark.parametrize(
    ("name", "estimator", "everything"),
    [
        ("rules", PerExample(), False),
        ("rules", PerExample(), True),
        ("rules", MicroBatch(), False),
        ("seen whole", PerExample(), False),
        ("rerun", PerExample(), False),
    ],
    ids=["norms", "everything", "micro-batches", "seen whole", "rerun"],
)
def test_a_meter(name: str, estimator: PerExample | MicroBatch, everything: bool) -> None:
    build, steps = MODELS[name]
    steps = steps // 3 if everything else steps
    model = build()
    coordinates = CoordinateReduction(kind="blocks") if everything else None
    meter = GradientMeter(model, estimator, inner_products=everything, coordinates=coordinates)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)

    def step(k: int) -> None:
        optimizer.zero_grad()
        x = torch.randint(0, 9, (6 + k % 3, 5), generator=generator)
        for part in x.split(4 if name == "rules" else 9):
            with meter.micro_batch(len(part), 1 / len(x)):
                (F.cross_entropy(model(part), part, reduction="sum") / (5 * len(x))).backward()
        assert meter.statistics().num_examples > 0
        optimizer.step()

    objects, memory = growth(step, steps)
    assert objects < 30
    assert memory < 8
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert not any(p._backward_hooks for p in model.parameters())


@pytest.mark.skipif(not PAGES.exists(), reason="reads /proc")
@pytest.mark.filterwarnings("ignore:.*no rule counts")
def test_an_engine() -> None:
    """Every step measured, and what is not measured of it too."""
    model = network()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)
    data = torch.utils.data.TensorDataset(torch.randint(0, 9, (500, 5)))
    engine = ada.AdaptiveBatch(
        model,
        optimizer,
        data,
        ada.NormTest(eta=0.5),
        global_batch_size=8,
        max_batch_size=8,
        total_samples=8 * (STEPS // 3),
        measure=ada.Measure(estimator=PerExample(), every=1, max_examples=4),
        bounds=ada.Bounds(monotone=False, max_growth=None),
    )
    steps = iter(engine)

    def step(k: int) -> None:
        current = next(steps)
        current.run(lambda batch: F.cross_entropy(model(batch[0]), batch[0]))
        current.update()

    objects, memory = growth(step, STEPS // 3)
    assert objects < 30
    assert memory < 8


@pytest.mark.parametrize("positions", [False, True], ids=["a table", "a layer that all examples share"])
def test_no_tensor_waits_for_the_garbage_collector(positions: bool) -> None:
    """Neither ordinary nor verifying steps make a circle through autograd's graph, which would hold all activations."""
    model = network()
    if positions:
        model.function = lambda m, x: m.head(m.norm(m.tokens(x) + m.places(torch.arange(5)))).transpose(1, 2)
        model.places = nn.Embedding(5, 6)
        del model.table, model.layer
    meter, x = GradientMeter(model, PerExample()), torch.randint(0, 9, (4, 5))

    def alive() -> int:
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    def step() -> None:
        with meter:
            F.cross_entropy(model(x), x).backward()
        meter.statistics()
        model.zero_grad()

    for _ in range(2):
        step()
    gc.collect()
    before = alive()
    gc.disable()
    try:
        for _ in range(4):  # of which two verify
            step()
        assert alive() == before
    finally:
        gc.enable()
