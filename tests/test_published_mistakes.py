"""Each mistake of the published code, timlautk/AdAdaGrad at cc126fb: how large it is, and that it is not made here.

 1 inner product variance one layer at a time      here, and as a policy in policies/test_on_gradients.py
 2 orthogonality one layer at a time               here
 3 square of a sum instead of sum of squares       here
 4 two counts of freedom in one variance           here
 5 AdaGrad-Norm that is not scalar                 optimizers/test_adagrad_norm.py
 6 no coordinate-wise test, Euclidean norm         here; the literal maximum in policies/test_on_gradients.py
   no finite-population factor                     policies/test_policies.py
 7 per-example gradients through BatchNorm         here
 8 batches that shrink at the end of an epoch      engine/test_paper.py
 9 nominal sizes instead of those trained on       engine/test_paper.py
10 a memory cap that does not cap                  here
11 sizes rounded up at every level                 engine/test_paper.py
12 accuracy that depends on a batch size           cli/test_evaluation.py
13 an epoch begun anew at each change              engine/test_paper.py
14 statistics in reduced precision                 here
15 an extra forward and backward                   here
16 one dropout mask for all examples               here
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from adadagrad.core.errors import BatchCoupledModule
from adadagrad.core.records import GradientStatistics, Observation
from adadagrad.core.reduction import CoordinateReduction
from adadagrad.policies import AugmentedInnerProductTest, CoordinateNormTest, InnerProductTest, NormTest
from adadagrad.statistics import GradientMeter, PerExample, statistics_from_units
from adadagrad.statistics.base import Request
from adadagrad.statistics.sums import WeightedSums
from tests.oracles import example_gradients

B = 128


def network() -> nn.Module:
    """A network 20-32-32-5 with tanh, at initialisation."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5)).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    centres = 0.3 * torch.randn(5, 20, dtype=torch.float64, generator=generator)
    labels = torch.randint(5, (B,), generator=generator)
    return centres[labels] + torch.randn(B, 20, dtype=torch.float64, generator=generator), labels


def trained(steps: int) -> nn.Module:
    model, (x, y) = network(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.zero_grad()
    return model


def measure(model: nn.Module, reduction: CoordinateReduction | None = None) -> GradientStatistics:
    x, y = data()
    meter = GradientMeter(model, PerExample(), inner_products=True, coordinates=reduction)
    with meter:
        nn.functional.cross_entropy(model(x), y).backward()
    return meter.statistics()


@functools.cache
def loop(steps: int) -> tuple[Tensor, list[int]]:
    """Every example's gradient (B, d), and the sizes of the parameter tensors."""
    model, (x, y) = trained(steps), data()
    rows = example_gradients(model, lambda m: nn.functional.cross_entropy(m(x), y, reduction="none"))
    return rows, [p.numel() for p in model.parameters()]


@pytest.mark.parametrize(("steps", "share"), [(0, 0.38), (50, 0.51), (500, 0.52)])
def test_1_the_inner_product_variance_is_of_the_whole_product(steps: int, share: float) -> None:
    """The sum over tensors l of Var_i <g_i^l, g^l> drops every covariance between layers: about half is left."""
    rows, sizes = loop(steps)
    g = rows.mean(0)
    layerwise = sum(float((a @ b).var()) for a, b in zip(rows.split(sizes, 1), g.split(sizes), strict=True))
    ours = measure(trained(steps))
    assert ours.inner_product_variance == pytest.approx(float((rows @ g).var()), rel=1e-10)
    assert layerwise / ours.inner_product_variance == pytest.approx(share, abs=0.03)
    wrong = GradientStatistics(
        num_examples=B,
        grad_norm_sq=ours.grad_norm_sq,
        variance_trace=ours.variance_trace,
        inner_product_variance=layerwise,
    )
    asked = [InnerProductTest(theta=0.9).required_batch_size(Observation(gradient=g)) for g in (ours, wrong)]
    assert asked[1] / asked[0] == pytest.approx(layerwise / ours.inner_product_variance)


@pytest.mark.parametrize(("steps", "share"), [(0, 0.960), (50, 0.964), (500, 0.996)])
def test_2_one_direction_is_removed_and_not_one_for_each_layer(steps: int, share: float) -> None:
    """Removing L directions leaves too little: 0.95 to 0.99 of it, and never more than all."""
    rows, sizes = loop(steps)
    layerwise = 0.0
    for part, g in zip(rows.split(sizes, 1), rows.mean(0).split(sizes), strict=True):
        layerwise += float((part - (part @ g / (g @ g))[:, None] * g).var(0).sum())
    g = rows.mean(0)
    across = float((rows - (rows @ g / (g @ g))[:, None] * g).var(0).sum())
    ours = measure(trained(steps))
    assert ours.orthogonal_variance == pytest.approx(across, rel=1e-10)
    assert layerwise < ours.orthogonal_variance
    assert layerwise / ours.orthogonal_variance == pytest.approx(share, abs=0.01)
    asked = AugmentedInnerProductTest(theta=1e9, nu=0.5).required_batch_size(Observation(gradient=ours))
    assert asked == pytest.approx(across / (0.25 * float(g @ g)), rel=1e-10)


def test_3_squares_are_summed_and_no_sum_is_squared() -> None:
    """Of a mean o that is not zero, (sum_j o_j)^2 is not |o|^2: it can be d times as much, or nothing.

    The global mean of the o_i is zero, so that their variance needs no mean at all; ours has none.
    """
    mean = torch.tensor([1.0, 1, 1, 1])
    assert float(mean.sum().square()) == 4 * float(mean.square().sum())
    rows, _ = loop(0)
    g = rows.mean(0)
    across = rows - (rows @ g / (g @ g))[:, None] * g
    assert float(across.mean(0).norm()) < 1e-12 * float(rows.norm())
    assert measure(trained(0)).orthogonal_variance == pytest.approx(float(across.square().sum()) / (B - 1), rel=1e-10)


@pytest.mark.parametrize(("n", "theory"), [(2, 1.375), (4, 1.1875), (16, 1.046875)])
def test_4_variances_of_ranks_are_pooled_with_one_count_of_freedom(n: int, theory: float) -> None:
    """Mean of unbiased variances within plus *population* variance between J = 4 ranks: 1 + (J-1)/(J n) times too much.

    Ours adds up |g_i|^2, and is the pooled form exactly for each draw.
    """
    draws = torch.randn(20_000, 4, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    mixed = draws.var(2).mean(1) + draws.mean(2).var(1, correction=0)
    assert float(mixed.mean()) == pytest.approx(theory, abs=0.02)
    ours, pooled = [], ((n - 1) * draws.var(2).sum(1) + n * draws.mean(2).var(1) * 3) / (4 * n - 1)
    for ranks in draws[:4000]:
        sums = WeightedSums()
        for rank in ranks:
            sums.add(torch.full((n,), 1 / (4 * n), dtype=torch.float64), rank.square())
        ours.append(sums.variance_trace(float(ranks.mean()) ** 2))
    assert ours == pytest.approx(pooled[:4000].tolist(), rel=1e-9)
    assert float(pooled.mean()) == pytest.approx(1.0, abs=0.015)


def test_6_a_coordinate_wise_test_exists_and_the_metric_may_be_the_steps() -> None:
    """The ratio of the coordinate-wise test from the backward itself, and weighted by the preconditioner.

    Its literal maximum is above 1e8 on this network, which the norm test is not.
    """
    rows, sizes = loop(0)
    g = rows.mean(0)
    ratios = rows.var(0) / g.square()
    ours = measure(trained(0), CoordinateReduction(kind="max"))
    assert ours.coordinate_ratio == pytest.approx(float(ratios.max()), rel=1e-6)
    observation = Observation(gradient=ours)
    assert NormTest(eta=0.5).required_batch_size(observation) < 1e4
    assert CoordinateNormTest(eta=0.5).required_batch_size(observation) > 1e3 * NormTest(eta=0.5).required_batch_size(
        observation
    )
    model, (x, y) = trained(0), data()
    moments = {p: torch.rand_like(p) + 0.1 for p in model.parameters()}
    request = Request(coordinates=CoordinateReduction(kind="weighted"), second_moment=moments.get)
    instrument = PerExample().open(model, request)
    with instrument.micro_batch():
        nn.functional.cross_entropy(model(x), y).backward()
    w = torch.cat([m.flatten().rsqrt() for m in moments.values()])
    expected = float((w * rows.var(0)).sum() / (w * g.square()).sum())
    assert instrument.finish().coordinate_ratio == pytest.approx(expected, rel=1e-10)
    assert len(sizes) == 6


def conv_batch_norm() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    layers = []
    for inputs in (3, 8):
        layers += [nn.Conv2d(inputs, 8, 3, padding=1), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).double()
    return model, torch.randn(64, 3, 8, 8, dtype=torch.float64), torch.randint(5, (64,))


def test_7_batch_normalisation_is_refused() -> None:
    """One example at a time, each normalised by itself, is another function: cosine 0.78 in a network like this."""
    model, x, y = conv_batch_norm()
    parameters = list(model.parameters())
    whole = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameters)
    single = [torch.zeros_like(p) for p in parameters]
    for i in range(64):
        loss = nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        for total, g in zip(single, torch.autograd.grad(loss, parameters), strict=True):
            total += g / 64
    a, b = (torch.cat([g.flatten() for g in gradients]) for gradients in (whole, single))
    assert float(a @ b / (a.norm() * b.norm())) < 0.95
    assert float((a - b).norm() / a.norm()) > 0.3
    with pytest.raises(BatchCoupledModule, match=r"1 \(BatchNorm2d\).*MicroBatch"):
        GradientMeter(model, PerExample())
    functional = nn.Sequential(model[0], Functional(), nn.ReLU(), *model[6:])
    meter = GradientMeter(functional, PerExample())
    with meter:
        nn.functional.cross_entropy(functional(x), y).backward()
    with pytest.raises(BatchCoupledModule, match="depends on the other examples"):
        meter.statistics()


class Functional(nn.Module):
    """Batch normalisation that no module name gives away."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, None, None, training=True)


class Widest(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that any operation makes, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


def wide() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(4)
    layers = [
        nn.Linear(256, 512),
        nn.ReLU(inplace=True),
        nn.Linear(512, 512),
        nn.ReLU(inplace=True),
        nn.Linear(512, 10),
    ]
    return nn.Sequential(*layers), torch.randn(256, 256)


@pytest.mark.parametrize("inner_products", [False, True])
def test_10_memory_does_not_hold_a_gradient_for_each_example(inner_products: bool) -> None:
    """b d elements are 102 million here; the widest tensor made is a weight, or an activation of the batch."""
    model, x = wide()
    meter = GradientMeter(model, PerExample(), inner_products=inner_products)
    d = sum(p.numel() for p in model.parameters())
    for _ in range(4):
        model.zero_grad()
        with Widest() as widest:
            with meter:
                model(x).square().sum(1).mean().backward()
            meter.statistics()
        assert widest.elements <= 512 * 512
    assert widest.elements < 256 * d / 300


def test_10_convolutions_and_sequences_hold_a_few_megabytes() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(64, 64, 3, padding=1))
    x = torch.randn(256, 16, 4, 4)
    meter = GradientMeter(model, PerExample())
    for _ in range(3):
        model.zero_grad()
        with Widest() as widest, meter:
            model(x).flatten(1).square().sum(1).mean().backward()
        meter.statistics()
        assert widest.elements * 4 <= 1 << 22
    assert 256 * sum(p.numel() for p in model.parameters()) * 4 > 10 << 22


def test_14_statistics_are_accumulated_in_double_whatever_the_gradient_is() -> None:
    """V is a difference: summed in bfloat16 nothing is left of it, in float32 or wider it is right."""
    rows = (torch.ones(256, 1000) + 0.01 * torch.randn(256, 1000, generator=torch.Generator().manual_seed(5))).double()
    exact = statistics_from_units(rows).variance_trace
    low = rows.bfloat16()
    squares, norm = low.square().sum(1).sum(), low.mean(0).square().sum()
    naive = float(squares - 256 * norm) / 255
    assert naive == 0.0
    sums = WeightedSums()
    sums.add(torch.full((256,), 1 / 256, dtype=torch.float64), rows.float().square().sum(1).double())
    assert sums.variance_trace(float(rows.float().mean(0).double().square().sum())) == pytest.approx(exact, rel=0.01)
    model, x = wide()
    meter = GradientMeter(model.bfloat16(), PerExample(), inner_products=True)
    with meter:
        model(x.bfloat16()).float().square().sum(1).mean().backward()
    for examples, weights, _ in meter._instrument._step.kept:
        assert examples.square_norms().dtype == weights.dtype == torch.float64
    meter.statistics()


@pytest.mark.parametrize(("inner_products", "extra"), [(False, 0.0), (True, 1 / 3)])
def test_15_measuring_costs_no_second_forward_and_backward(inner_products: bool, extra: float) -> None:
    """Counted in flops of matrix products: nothing for one position, one more forward for inner products.

    An extra vmapped forward and backward would be 1.0 or more.
    """
    model, x = wide()
    meter = GradientMeter(model, PerExample(), inner_products=inner_products)

    def step(measured: bool) -> int:
        model.zero_grad()
        with FlopCounterMode(display=False) as counter:
            if measured:
                with meter:
                    model(x).square().sum(1).mean().backward()
                meter.statistics()
            else:
                model(x).square().sum(1).mean().backward()
        return counter.get_total_flops()

    for _ in range(3):
        step(True)
    plain, measured = step(False), step(True)
    assert measured / plain - 1 == pytest.approx(extra, abs=0.06)
    assert "forward" not in vars(model)


def test_16_examples_have_dropout_masks_of_their_own() -> None:
    """One mask for all examples correlates their gradients: the variance of g is then far from V/b.

    Ours measures the masks that training drew.
    """
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 1)).double()
    x = torch.randn(16, 8, dtype=torch.float64)
    masks: list[Tensor] = []
    model[2].register_forward_hook(lambda module, inputs, output: masks.append((output != 0) | (inputs[0] == 0)))
    meter = GradientMeter(model, PerExample(calibrate=False), inner_products=True)
    with meter:
        model(x).square().sum(1).mean().backward()
    statistics = meter.statistics()
    (mask,) = masks
    assert len({tuple(row.tolist()) for row in mask}) == 16
    fixed = lambda m: m[3](m[1](m[0](x)) * mask * 2).square().sum(1)  # noqa: E731
    expected = statistics_from_units(example_gradients(model, fixed))
    assert statistics.variance_trace == pytest.approx(expected.variance_trace, rel=1e-10)
    assert statistics.inner_product_variance == pytest.approx(expected.inner_product_variance, rel=1e-10)
