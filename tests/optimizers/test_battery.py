"""What every optimizer must do, one row of `cases.py` each."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadagrad.core.errors import InvalidArgument
from adadagrad.optimizers import base
from tests.optimizers.cases import CASES, Case, take_step

GOLDEN = Path(__file__).parent.parent / "golden" / "optimizers.json"
each = pytest.mark.parametrize("case", CASES, ids=str)
SHAPES = [(4, 3), (3,), (2, 3, 2), ()]


def parameters(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def evaluation(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter], step: int, scale: float = 1.0, to_none: bool = True
) -> Callable[[], float]:
    """A noisy quadratic, whose noise is that of the step, through autograd."""

    def evaluate() -> float:
        optimizer.zero_grad(set_to_none=to_none)
        generator = torch.Generator().manual_seed(50 + step)
        noise = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in params]
        loss = sum((p.square().sum() + (p * n).sum() for p, n in zip(params, noise, strict=True)), torch.zeros(()))
        (scale * loss).backward()
        return loss.item()

    return evaluate


def train(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range = range(6), **options: Any
) -> list[Tensor]:
    for step in steps:
        take_step(optimizer, evaluation(optimizer, params, step, **options))
    return [p.detach().clone() for p in params]


def equal(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def lower(optimizer: torch.optim.Optimizer, lr: float, done: float) -> None:
    """A rate that falls linearly to 0, without which signs and normalised steps never come to rest."""
    for group in optimizer.param_groups:
        group["lr"] = lr * (1 - done)


@each
def test_converges_on_a_convex_quadratic(case: Case) -> None:
    """Eigenvalues from 0.1 to 2, as a matrix so that orthogonalised updates are in their element."""
    x = nn.Parameter(torch.linspace(-2, 3, 12).reshape(4, 3).double())
    h = torch.logspace(-1, math.log10(2), 12).reshape(4, 3).double()
    optimizer = case.build([x])

    def evaluate() -> float:
        optimizer.zero_grad()
        loss = (h * x.square()).sum() / 2
        loss.backward()
        return loss.item()

    first = evaluate()
    for t in range(600):
        lower(optimizer, case.lr, t / 600)
        take_step(optimizer, evaluate)
    assert evaluate() < 1e-3 * first


@each
def test_goes_down_the_valley_of_rosenbrock(case: Case) -> None:
    x = nn.Parameter(torch.tensor([[-1.5, 2.0]]).double())
    lr, steps = case.rosenbrock
    optimizer = case.build([x], lr=lr)

    def evaluate() -> float:
        optimizer.zero_grad()
        a, b = x.flatten()
        loss = (1 - a) ** 2 + 100 * (b - a * a) ** 2
        loss.backward()
        return loss.item()

    first = evaluate()
    for t in range(steps):
        lower(optimizer, lr, t / steps)
        take_step(optimizer, evaluate)
    assert evaluate() < 0.05 * first


@each
def test_learns_the_digits(case: Case) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    x, y = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Linear(64, 10)
    optimizer = case.build(model.parameters(), lr=case.digits)

    def evaluate() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.item()

    for t in range(60 + case.delayed):
        lower(optimizer, case.digits, t / 60 / 2)
        take_step(optimizer, evaluate)
    assert float((model(x).argmax(1) == y).float().mean()) > 0.9


@each
def test_the_state_goes_on_bit_for_bit_after_a_file(case: Case) -> None:
    params, others = parameters(), parameters()
    optimizer = case.build(params)
    train(optimizer, params, range(4))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": [p.detach() for p in params]}, file)
    file.seek(0)
    content = torch.load(file, weights_only=True)
    other = case.build(others)
    with torch.no_grad():
        for p, value in zip(others, content["params"], strict=True):
            p.copy_(value)
    saved = copy.deepcopy(content["optimizer"])
    other.load_state_dict(content["optimizer"])
    assert equal(train(optimizer, params, range(4, 9)), train(other, others, range(4, 9)))
    assert flat(content["optimizer"]) == flat(saved)  # what was loaded from is left alone


def flat(value: Any) -> Any:
    """A nested value, with tensors as lists."""
    if isinstance(value, dict):
        return {key: flat(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [flat(entry) for entry in value]
    return [str(value.dtype), value.tolist()] if isinstance(value, Tensor) else value


@each
def test_half_precision_trains_and_its_state_loads_as_it_was(case: Case) -> None:
    params, others = parameters(torch.bfloat16), parameters(torch.bfloat16)
    optimizer, other = case.build(params), case.build(others)
    first = [p.detach().clone() for p in params]
    found = train(optimizer, params)
    assert all(bool(p.isfinite().all()) for p in found)
    assert not equal(first, found)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert flat(other.state_dict()["state"]) == flat(optimizer.state_dict()["state"])


@each
def test_the_same_as_last_time(case: Case) -> None:
    """The trajectory that was written down; ADADAGRAD_GOLDEN=1 writes it anew."""
    params = parameters()
    found = [v for p in train(case.build(params), params, range(8)) for v in p.flatten().tolist()]
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("ADADAGRAD_GOLDEN") == "1":
        GOLDEN.write_text(json.dumps({**golden, case.name: found}, indent=0, sort_keys=True) + "\n")
    else:
        rough = 1e-3 if case.name in ("MARS shampoo", "MARSM") else 0.0  # bfloat16 is not the same on every processor
        assert found == pytest.approx(
            golden[case.name], rel=rough if rough else 1e-9, abs=rough / 10 if rough else 1e-12
        )


@each
def test_maximising_is_minimising_the_opposite(case: Case) -> None:
    up, down = parameters(), parameters()
    assert equal(train(case.build(up, maximize=True), up, scale=-1.0), train(case.build(down), down, scale=1.0))


@each
def test_parameters_without_a_gradient_are_left_alone(case: Case) -> None:
    params = parameters()
    idle = nn.Parameter(torch.ones(3, 2).double())
    optimizer = case.build([*params[:1], idle, *params[1:]], weight_decay=0.1)
    found = train(optimizer, params)
    assert torch.equal(idle.detach(), torch.ones(3, 2).double())
    alone = parameters()
    assert equal(found, train(case.build(alone, weight_decay=0.1), alone)) or case.name in ("SIFT", "AdaRankGrad")
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)  # with a parameter that never had one
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))


@each
def test_a_step_without_any_gradient_does_nothing(case: Case) -> None:
    params = parameters()
    optimizer = case.build(params)
    take_step(optimizer, lambda: 0.0)
    assert equal([p.detach() for p in params], [p.detach() for p in parameters()])


@each
def test_clearing_gradients_to_zero_or_to_none_is_the_same(case: Case) -> None:
    """What is remembered of a gradient is a copy: zeroing it in place must not reach into the state."""
    zero, none = parameters(), parameters()
    assert equal(train(case.build(zero), zero, to_none=False), train(case.build(none), none, to_none=True))


@each
def test_no_state_shares_memory_with_a_gradient_or_parameter(case: Case) -> None:
    params = parameters()
    optimizer = case.build(params)
    train(optimizer, params)
    mine = {t.untyped_storage().data_ptr() for t in tensors_of(optimizer.state_dict()) if t.numel() > 1}
    theirs = {t.untyped_storage().data_ptr() for p in params for t in (p, p.grad) if t is not None}
    assert not mine & theirs


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [t for entry in entries for t in tensors_of(entry)]


@pytest.mark.parametrize(("case", "option"), [(case, option) for case in CASES for option in case.changes], ids=str)
def test_an_option_holds_for_its_group_alone(case: Case, option: str) -> None:
    """Two groups, of which one has another option, do what two optimizers do; and the option does something."""
    one, two, both = parameters(), parameters(), parameters()
    expected = train(case.build(one), one)
    changed = train(case.build(two, **{option: case.changes[option]}), two)
    groups = [{"params": both[:2]}, {"params": both[2:], option: case.changes[option]}]
    found = train(case.build(groups), both)
    assert not equal(expected, changed)
    assert equal(found, expected[:2] + changed[2:])


@each
def test_large_tensors_are_worked_on_in_pieces(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, pieces = parameters(), parameters()
    expected = train(case.build(whole), whole)
    monkeypatch.setattr(base, "PIECE", 5)
    for a, b in zip(train(case.build(pieces), pieces), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@each
def test_storage_that_is_not_in_a_row_trains_the_same(case: Case) -> None:
    plain, turned = parameters(), parameters()
    turned[0] = nn.Parameter(turned[0].detach().T.contiguous().T)
    assert not turned[0].is_contiguous()
    for a, b in zip(train(case.build(plain), plain), train(case.build(turned), turned), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", [case for case in CASES if case.scaleless is not None], ids=str)
def test_scaling_all_gradients_changes_nothing(case: Case) -> None:
    assert case.scaleless is not None
    one, two = parameters(), parameters()
    small, large = (train(case.build(p, **case.scaleless), p, scale=scale) for p, scale in ((one, 1.0), (two, 8.0)))
    for a, b in zip(small, large, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", [case for case in CASES if case.compiles], ids=str)
def test_a_compiled_step_reads_nothing_back_and_does_the_same(case: Case) -> None:
    """One graph: a number read from a tensor would break it. `capturable` alone does the same, too."""
    plain, captured, compiled = parameters(), parameters(), parameters()
    expected = train(case.build(plain), plain)
    torch.compiler.reset()
    optimizer = case.build(compiled, capturable=True)
    step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    for t in range(6):
        evaluation(optimizer, compiled, t)()
        step()
    for other in (train(case.build(captured, capturable=True), captured), [p.detach() for p in compiled]):
        for a, b in zip(other, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # counts are float32, as torch's


@pytest.mark.parametrize("case", [case for case in CASES if case.compiles], ids=str)
def test_the_learning_rate_may_be_a_tensor(case: Case) -> None:
    plain, other, compiled = parameters(), parameters(), parameters()
    expected = train(case.build(plain), plain)
    lr = torch.tensor(case.lr, dtype=torch.float64)
    optimizer = case.build(compiled, lr=lr, capturable=True)
    torch.compiler.reset()
    step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    for t in range(6):
        evaluation(optimizer, compiled, t)()
        step()
    for found in (train(case.build(other, lr=lr), other), [p.detach() for p in compiled]):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@each
def test_a_scheduler_of_torch_moves_it(case: Case) -> None:
    by_hand, scheduled = parameters(), parameters()
    one, two = case.build(by_hand), case.build(scheduled)
    schedule = torch.optim.lr_scheduler.StepLR(two, 2, 0.5)
    for t in range(6):
        for group in one.param_groups:
            group["lr"] = case.lr * 0.5 ** (t // 2)
        take_step(one, evaluation(one, by_hand, t))
        take_step(two, evaluation(two, scheduled, t))
        schedule.step()
    assert equal([p.detach() for p in by_hand], [p.detach() for p in scheduled])


@each
def test_copies_and_pickles(case: Case) -> None:
    params = parameters()
    optimizer = case.build(params)
    train(optimizer, params, range(3))
    other_params, other = pickle.loads(pickle.dumps((params, optimizer)))
    third_params, third = copy.deepcopy((params, optimizer))
    expected = train(optimizer, params, range(3, 6))
    assert equal(expected, train(other, other_params, range(3, 6)))
    assert equal(expected, train(third, third_params, range(3, 6)))


@each
def test_a_closure_gives_gradients_and_the_loss(case: Case) -> None:
    params, others = parameters(), parameters()
    one, two = case.build(params), case.build(others)
    if hasattr(one, "extrapolated"):
        pytest.skip("a closure would be evaluated at the parameters, not where this optimizer wants its gradient")
    for t in range(3):
        expected = take_step(two, evaluation(two, others, t))
        assert one.step(evaluation(one, params, t)) == expected
    assert equal([p.detach() for p in params], [p.detach() for p in others])


@each
def test_named_parameters_and_later_groups(case: Case) -> None:
    plain, named = parameters(), parameters()
    expected = train(case.build(plain), plain)
    optimizer = case.build([("first", named[0]), ("second", named[1])])
    optimizer.add_param_group({"params": [("third", named[2]), ("fourth", named[3])]})
    assert equal(expected, train(optimizer, named)) or case.name == "AdaGradNorm"  # which adds up over a group
    assert optimizer.param_groups[1]["param_names"] == ["third", "fourth"]


@each
def test_bad_input_is_refused_by_name_and_changes_nothing(case: Case) -> None:
    with pytest.raises(InvalidArgument, match=r"lr must be >= 0, got -0.1"):
        case.build(parameters(), lr=-0.1)
    with pytest.raises(InvalidArgument, match=r"lr must be >= 0, got nan"):
        case.build(parameters(), lr=math.nan)
    for wrong in ("0.1", None, True):
        with pytest.raises(InvalidArgument, match=f"lr must be >= 0, got {wrong!r}"):
            case.build(parameters(), lr=wrong)
    with pytest.raises(InvalidArgument, match=r"params must be real, got torch.complex64 for parameter 1 of its group"):
        case.build([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="empty parameter list"):
        case.build([])
    with pytest.raises(InvalidArgument, match=r"has no option momentun"):
        case.build([{"params": parameters(), "momentun": 0.5}])
    table = nn.Embedding(5, 2, sparse=True)
    other = nn.Parameter(torch.ones(2))
    optimizer = case.build([other, table.weight])
    before = table.weight.detach().clone()

    def evaluate() -> float:
        other.grad = torch.ones(2)
        table.weight.grad = None
        table(torch.tensor([1, 3])).sum().backward()
        return 0.0

    with pytest.raises(InvalidArgument, match=r"needs dense gradients.*parameter 1 of its group.*set sparse=False"):
        take_step(optimizer, evaluate)
    assert torch.equal(before, table.weight.detach())
    assert torch.equal(other.detach(), torch.ones(2))


@each
def test_a_state_of_other_parameters_is_refused(case: Case) -> None:
    params = parameters()
    optimizer = case.build(params)
    train(optimizer, params)
    with pytest.raises(ValueError, match=r"doesn't match the size|trained whole here, or missing"):
        case.build(parameters()[:2]).load_state_dict(optimizer.state_dict())
