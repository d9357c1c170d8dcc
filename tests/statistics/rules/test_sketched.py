"""Sketches of per-example gradients: linear in them, right on average over all signs, and only where they pay."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from adadagrad.statistics.rules import find_rule, find_sketch
from adadagrad.statistics.sketches import Sketches
from tests.statistics.checking import floats

Build = Callable[[], nn.Module]

LAYERS: dict[str, tuple[Build, tuple[int, ...]]] = {
    "linear, signs on the input": (lambda: nn.Linear(3, 5), (4, 6, 3)),
    "linear, signs on the output": (lambda: nn.Linear(7, 4), (4, 2, 3, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 5, 2, 2, 1), (4, 4, 9)),
    "conv2d, groups, dilation": (lambda: nn.Conv2d(4, 6, (2, 1), (2, 1), 1, (1, 2), groups=2), (4, 4, 7, 6)),
    "conv2d, same": (lambda: nn.Conv2d(2, 3, (2, 3), padding="same"), (4, 2, 6, 5)),
    "conv2d, circular": (lambda: nn.Conv2d(2, 3, 2, padding=1, padding_mode="circular"), (4, 2, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (2, 1, 2), groups=2), (4, 2, 4, 3, 4)),
}


def case(name: str) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A layer, its input, its output's gradient, and the weight's gradient of every example."""
    build, shape = LAYERS[name]
    layer, x = build().double(), floats(*shape)
    gy = floats(*layer(x).shape).cos()
    return layer, x, gy, find_rule(layer).gradients(layer, x, gy, {"weight"})["weight"]


@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@pytest.mark.parametrize("name", LAYERS)
def test_an_examples_sketch_is_the_sketch_of_its_gradient(name: str) -> None:
    layer, x, gy, gradients = case(name)
    sketch = find_sketch(layer)
    signs = Sketches(3, 0, 0).signs("", sketch.shape(layer, 3), gy)
    rows = sketch.examples(layer, x, gy, signs)
    expected = torch.stack([sketch.of_gradient(gradient, signs) for gradient in gradients])
    assert rows.shape[:2] == (4, 3)
    torch.testing.assert_close(rows, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@pytest.mark.parametrize("name", LAYERS)
def test_mean_and_variance_over_all_signs(name: str) -> None:
    """Every vector of signs once: the mean is |g|^2, the variance 2 (|M|_F^2 - sum M_jj^2), group by group."""
    layer, x, gy, gradients = case(name)
    sketch = find_sketch(layer)
    one = sketch.shape(layer, 1)
    size = torch.Size(one).numel()
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=size)), dtype=torch.float64)
    squares = sketch.examples(layer, x, gy, signs.view(-1, *one[1:])).square().sum(2)  # (n, all signs)
    torch.testing.assert_close(squares.mean(1), gradients.flatten(1).square().sum(1), rtol=1e-10, atol=0)
    expected = torch.zeros(len(x), dtype=torch.float64)
    groups = one[1] if len(one) > 2 else 1
    for part in gradients.flatten(2).chunk(groups, 1):
        side = part.mT if part.shape[1] < part.shape[2] and groups == 1 and gradients.dim() == 3 else part
        gram = side.mT @ side
        expected += 2 * (gram.square().sum((1, 2)) - gram.diagonal(dim1=1, dim2=2).square().sum(1))
    torch.testing.assert_close(squares.var(1, correction=0), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("layer", "shape", "pays"),
    [
        (nn.Linear(30, 20), (2, 9, 30), True),
        (nn.Linear(30, 20), (2, 30), False),  # one position
        (nn.Linear(30, 20), (2, 4, 30), False),  # as few positions as probes: the Gram form is no dearer
        (nn.Linear(6, 8), (2, 9, 6), False),  # 4 (6 + 8) >= 6 * 8
        (nn.Linear(30, 20), (0, 9, 30), False),
        (nn.Conv2d(3, 64, 3), (2, 3, 9, 9), False),  # patches of 27
        (nn.Conv2d(4, 64, 3), (2, 4, 40, 40), True),
        (nn.Conv2d(64, 64, 7, groups=64), (2, 64, 9, 9), False),
        (nn.Conv2d(64, 4, 3), (2, 64, 9, 9), False),  # no more outputs than probes
        (nn.Conv2d(96, 96, 3, padding=1), (2, 96, 8, 8), True),  # also beside products of positions
        (nn.Conv2d(400, 400, 1), (2, 400, 1, 1), False),  # one position is one product of positions
        (nn.Conv1d(16, 16, 3), (2, 16, 9), True),
    ],
    ids=str,
)
def test_a_sketch_pays_where_it_is_fewer_flops(layer: nn.Module, shape: tuple[int, ...], pays: bool) -> None:
    assert find_sketch(layer).pays(layer, torch.zeros(shape), 4) == pays


def test_a_layer_that_computes_something_else_has_no_sketch() -> None:
    class Other(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).exp()

    assert find_sketch(nn.Linear(2, 2)) is not None
    assert find_sketch(Other(2, 2)) is find_sketch(nn.LayerNorm(2)) is find_sketch(nn.Embedding(2, 2)) is None


def test_signs_follow_from_seed_step_and_name_alone() -> None:
    like = torch.zeros(1)
    state = torch.get_rng_state()
    first = Sketches(2, 0, 7).signs("a", (2, 200), like)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.unique().tolist() == [-1.0, 1.0]
    assert not torch.equal(first[0], first[1])
    again = Sketches(2, 0, 7)
    again.signs("b", (2, 9), like)
    assert torch.equal(again.signs("a", (2, 200), like), first)
    for seed, number, name in ((1, 7, "a"), (0, 8, "a"), (0, 7, "b")):
        assert not torch.equal(Sketches(2, seed, number).signs(name, (2, 200), like), first)
