"""AdaGradNorm against the definition written out in float64, and what the published code gets wrong."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adadagrad.core.errors import InvalidArgument
from adadagrad.optimizers import AdaGradNorm


def reference_step(params: list[Tensor], grads: list[Tensor], v: float, lr: float, decay: float, sign: float) -> float:
    """One step in plain Python loops over all entries; changes `params`, returns the new accumulator."""
    for grad in grads:
        for entry in grad.flatten().tolist():
            v += entry**2
    for param, grad in zip(params, grads, strict=True):
        flat, slope = param.view(-1), grad.flatten().tolist()
        for index in range(flat.numel()):
            flat[index] = flat[index].item() * (1 - lr * decay) + sign * lr / math.sqrt(v) * slope[index]
    return v


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Convolutions in one, two and three dimensions' worth of shapes: 5, 4, 3, 2, 1 and 0 dimensions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    model.register_parameter("volume", nn.Parameter(torch.randn(2, 1, 2, 1, 2)))
    model.register_parameter("slab", nn.Parameter(torch.randn(2, 2, 2)))
    model.register_parameter("scale", nn.Parameter(torch.tensor(1.5)))
    return model.to(dtype)


def backward(model: nn.Module, seed: int) -> None:
    """Fill the gradients from data made from the seed."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x = torch.randn(4, 1, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    for param in model.parameters():
        param.grad = None
    loss = model(x).square().sum() * model.scale + model.volume.pow(3).sum() + model.slab.sin().sum()  # type: ignore[operator, union-attr]
    loss.backward()


def weights(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def accumulator(optimizer: AdaGradNorm, group: int = 0) -> float:
    return float(optimizer.param_groups[group]["accumulator"])


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_equals_the_definition(decay: float, maximize: bool) -> None:
    model = network()
    optimizer = AdaGradNorm(model.parameters(), lr=0.05, initial_accumulator=0.7, weight_decay=decay, maximize=maximize)
    params, v = weights(model), 0.7
    for seed in range(5):
        backward(model, seed)
        grads = [param.grad.clone() for param in model.parameters() if param.grad is not None]
        v = reference_step(params, grads, v, 0.05, decay, 1.0 if maximize else -1.0)
        optimizer.step()
        assert accumulator(optimizer) == pytest.approx(v, rel=1e-12)
        for param, expected in zip(model.parameters(), params, strict=True):
            torch.testing.assert_close(param.detach(), expected, rtol=1e-12, atol=1e-14)


def test_one_scalar_over_all_parameters_and_no_other_state() -> None:
    model = network()
    optimizer = AdaGradNorm(model.parameters())
    backward(model, 1)
    optimizer.step()
    assert optimizer.param_groups[0]["accumulator"].shape == ()
    assert optimizer.param_groups[0]["accumulator"].dtype == torch.float64
    assert not optimizer.state


def test_every_entry_moves_by_the_same_multiple_of_its_gradient() -> None:
    """Biases included: the published code adds other parameters' norms to theirs."""
    model = network()
    optimizer = AdaGradNorm(model.parameters(), lr=0.1, initial_accumulator=0.01)
    backward(model, 1)
    before = weights(model)
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    total = sum(float(grad.square().sum()) for grad in grads)
    optimizer.step()
    for old, new, grad in zip(before, model.parameters(), grads, strict=True):
        torch.testing.assert_close(old - new, 0.1 / math.sqrt(0.01 + total) * grad, rtol=1e-9, atol=1e-12)


def test_order_of_parameters_does_not_matter() -> None:
    first, second = network(), network()
    one = AdaGradNorm(first.parameters(), lr=0.1)
    two = AdaGradNorm(reversed(list(second.parameters())), lr=0.1)
    for seed in range(3):
        for model, optimizer in ((first, one), (second, two)):
            backward(model, seed)
            optimizer.step()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


def test_weight_decay_works_at_zero_gradient() -> None:
    param = nn.Parameter(torch.tensor([2.0, -4.0], dtype=torch.float64))
    optimizer = AdaGradNorm([param], lr=0.1, weight_decay=0.5)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.tensor([1.9, -3.8], dtype=torch.float64))
    assert accumulator(optimizer) == 0.01


def test_missing_gradients_are_skipped() -> None:
    used, unused = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = AdaGradNorm([used, unused], lr=0.1, weight_decay=0.5)
    optimizer.step()  # nothing at all to do
    assert accumulator(optimizer) == pytest.approx(0.01)
    used.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(unused.detach(), torch.ones(3))
    assert not torch.equal(used.detach(), torch.ones(3))
    assert accumulator(optimizer) == pytest.approx(3.01)


def test_squares_are_added_in_float64() -> None:
    """1e8 + 1 is lost in float32, and the square of 1e-5 is no float16 number."""
    param = nn.Parameter(torch.zeros(1))
    optimizer = AdaGradNorm([param], initial_accumulator=1e8)
    param.grad = torch.ones(1)
    for _ in range(4):
        optimizer.step()
    assert accumulator(optimizer) == 1e8 + 4
    half = nn.Parameter(torch.zeros(1000, dtype=torch.float16))
    optimizer = AdaGradNorm([half], initial_accumulator=1e-9)
    half.grad = torch.full_like(half, 1e-5)
    optimizer.step()
    assert accumulator(optimizer) == pytest.approx(1e-9 + 1000 * float(half.grad[0]) ** 2, rel=1e-9)


def test_mixed_dtypes_share_the_accumulator() -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    params = [nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in dtypes]
    optimizer = AdaGradNorm(params, lr=1.0, initial_accumulator=1.0)
    for param in params:
        param.grad = torch.full_like(param, 2.0)
    optimizer.step()  # v = 1 + 6 * 4 = 25, so each moves by 2 / 5
    for param in params:
        torch.testing.assert_close(param.detach().double(), torch.full((2,), -0.4).double(), rtol=1e-2, atol=0)
    assert [param.dtype for param in params] == list(dtypes)
    assert accumulator(optimizer) == pytest.approx(25.0, rel=1e-12)


def test_groups_have_their_own_options_and_accumulators() -> None:
    a, b, c = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(3))
    optimizer = AdaGradNorm([{"params": [a]}, {"params": [b], "lr": 2.0, "initial_accumulator": 16.0}], lr=1.0)
    optimizer.add_param_group({"params": [c], "initial_accumulator": 7.0})
    for param in (a, b, c):
        param.grad = torch.full_like(param, 3.0)
    optimizer.step()
    assert [accumulator(optimizer, group) for group in range(3)] == pytest.approx([9.01, 25.0, 16.0])
    assert [param.item() for param in (a, b, c)] == pytest.approx([-3 / math.sqrt(9.01), -6 / 5, -3 / 4])


def run(model: nn.Module, optimizer: AdaGradNorm, seeds: range) -> None:
    for seed in seeds:
        backward(model, seed)
        optimizer.step()


@pytest.mark.parametrize("through_file", [False, True])
def test_resuming_is_bitwise(through_file: bool) -> None:
    def build() -> tuple[nn.Module, AdaGradNorm]:
        model = network(torch.float32)
        params = list(model.parameters())
        groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.02}]
        return model, AdaGradNorm(groups, lr=0.05, weight_decay=0.01)

    whole, optimizer = build()
    run(whole, optimizer, range(3))
    saved: dict[str, Any] = {"model": whole.state_dict(), "optimizer": optimizer.state_dict()}
    if through_file:
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    else:
        saved = copy.deepcopy(saved)
    run(whole, optimizer, range(3, 6))

    resumed, other = build()
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert other.param_groups[0]["accumulator"].dtype == torch.float64  # not cast to the parameters' float32
    run(resumed, other, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert [accumulator(optimizer, g) for g in range(2)] == [accumulator(other, g) for g in range(2)]


def test_loading_and_copying_do_not_share_the_accumulator() -> None:
    model = network()
    optimizer = AdaGradNorm(model.parameters())
    run(model, optimizer, range(2))
    value = accumulator(optimizer)
    loaded = AdaGradNorm(network().parameters())
    loaded.load_state_dict(optimizer.state_dict())
    _, copied = copy.deepcopy((model, optimizer))
    run(model, optimizer, range(2, 4))
    assert accumulator(optimizer) > value
    assert accumulator(loaded) == accumulator(copied) == value


def test_closure_runs_with_gradients_enabled() -> None:
    param = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = AdaGradNorm([param], lr=10.0, initial_accumulator=75.0)

    def closure() -> float:
        optimizer.zero_grad()
        loss = param.square().sum() / 2
        loss.backward()
        return loss.item()

    with torch.no_grad():
        assert optimizer.step(closure) == 12.5
    torch.testing.assert_close(param.detach(), torch.zeros(2))
    assert optimizer.step() is None


def test_works_with_a_torch_scheduler() -> None:
    param = nn.Parameter(torch.zeros(1))
    optimizer = AdaGradNorm([param], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    param.grad = torch.ones(1)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr must be >= 0, got -0.1"),
        ({"initial_accumulator": 0.0}, "initial_accumulator must be > 0, got 0.0"),
        ({"initial_accumulator": -1.0}, "initial_accumulator must be > 0, got -1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0, got -1.0"),
    ],
)
def test_bad_options(options: dict[str, float], message: str) -> None:
    param = nn.Parameter(torch.zeros(1))
    with pytest.raises(InvalidArgument, match=message):
        AdaGradNorm([param], **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=message):
        AdaGradNorm([{"params": [param], **options}])


def test_sparse_gradients_are_refused_by_name_and_change_nothing() -> None:
    dense = nn.Parameter(torch.ones(2))
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = AdaGradNorm([{"params": [dense]}, {"params": [nn.Parameter(torch.ones(1)), embedding.weight]}])
    dense.grad = torch.ones(2)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(InvalidArgument, match=r"parameter 1 of its group, of shape \(10, 4\): set sparse=False"):
        optimizer.step()
    assert torch.equal(dense.detach(), torch.ones(2))
    assert accumulator(optimizer) == pytest.approx(0.01)


def test_complex_parameters_are_refused_by_name() -> None:
    params = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(3, dtype=torch.complex64))]
    with pytest.raises(InvalidArgument, match=r"got torch.complex64 for parameter 1 of its group, of shape \(3,\)"):
        AdaGradNorm(params)
    optimizer = AdaGradNorm(params[:1])
    with pytest.raises(InvalidArgument, match="params must be real"):
        optimizer.add_param_group({"params": params[1:]})
    assert len(optimizer.param_groups) == 1
