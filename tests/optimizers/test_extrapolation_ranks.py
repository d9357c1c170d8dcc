"""The extrapolating optimizers on two ranks: each displaced by its own last gradient, whole or sharded."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from adadagrad.core.errors import InvalidArgument, StepError
from adadagrad.core.mixing import seed_for
from adadagrad.optimizers.extrapolated_adam import ExtrapolatedAdam
from adadagrad.optimizers.extrapolated_sgd import ExtrapolatedSGD
from tests.ranks import on_two_ranks

SGD: dict[str, dict[str, Any]] = {
    "local": {},
    "heavy ball": {"nesterov": False, "weight_decay": 0.1},
    "global": {"perturb": "past_global"},
    "plain": {"extrapolation": 0.0},
    "adam": {"direction": "grad", "extrapolation": 0.5},
    "precond": {"direction": "precond"},
}
NEEDS = {"local", "heavy ball", "adam"}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def batch(step: int, rank: int, part: int = 0) -> Tensor:
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(100 * step + 10 * rank + part)).double()


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = (model(x) - x[:, :4]).pow(4).mean()
    return loss


def built(name: str, model: nn.Module, **options: Any) -> Any:
    kind = ExtrapolatedAdam if name in ("adam", "precond") else ExtrapolatedSGD
    return kind(model.parameters(), lr=0.05, **SGD[name], **options)


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def distributed(rank: int, accumulated: bool, views: bool) -> dict[str, Any]:
    """Train under the wrapper, in one context a step, of two micro-batches where `accumulated`."""
    found: dict[str, Any] = {}
    for name in SGD:
        model = network()
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=views)
        optimizer = built(name, model)
        assert optimizer.needs_local_gradients == (name in NEEDS or name == "plain")  # extrapolation may be raised
        if optimizer.needs_local_gradients:
            optimizer.keep_local_gradients(wrapped)
        assert not optimizer.needs_local_gradients
        inside, outside, expected = [], [], []
        for t in range(5):
            w = flat(model.parameters())
            parts = (0, 1) if accumulated else (0,)
            one_context = t % 2 == 0  # around all micro-batches, or one around each: gradients accumulate either way
            with optimizer.extrapolated() if one_context else nullcontext():
                for part in parts:
                    with (
                        wrapped.no_sync() if part != parts[-1] else nullcontext(),
                        nullcontext() if one_context else optimizer.extrapolated(),
                    ):
                        if part == 0:
                            inside.append(flat(model.parameters()) - w)
                        (loss_of(wrapped, batch(t, rank, part)) / len(parts)).backward()
            if name in ("local", "heavy ball"):
                twin = network()
                with torch.no_grad():
                    for p, q, d in zip(
                        twin.parameters(), model.parameters(), split_like(inside[-1], model), strict=True
                    ):
                        p.copy_(q + d)
                (sum(loss_of(twin, batch(t, rank, part)) for part in parts) / len(parts)).backward()  # type: ignore[union-attr]
                expected.append(flat([p.grad for p in twin.parameters()]))  # type: ignore[misc]
            optimizer.step()
            optimizer.zero_grad()
            outside.append(flat(model.parameters()))
        states = [optimizer.state[p] for p in model.parameters()]
        found[name] = {
            "inside": inside, "outside": outside, "expected": expected, "state": [dict(s) for s in states],
            "velocity": [flat(s["velocity"] for s in states)] if "velocity" in states[0] else [],
        }  # fmt: skip
    return found


def split_like(vector: Tensor, model: nn.Module) -> list[Tensor]:
    pieces = torch.split(vector, [p.numel() for p in model.parameters()])
    return [piece.view_as(p) for piece, p in zip(pieces, model.parameters(), strict=True)]


def simulated(name: str, accumulated: bool) -> list[Tensor]:
    """The same two workers in one process."""
    model = network()
    optimizer = built(name, model, workers=2)
    outside = []
    parts = (0, 1) if accumulated else (0,)
    for t in range(5):
        for rank in range(2):
            for part in parts:
                with optimizer.extrapolated(worker=rank):
                    (loss_of(model, batch(t, rank, part)) / 2 / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()
        outside.append(flat(model.parameters()))
    return outside


@pytest.fixture(scope="module", params=[(False, False), (True, False), (True, True)], ids=str)
def run(request: pytest.FixtureRequest) -> tuple[bool, list[dict[str, Any]]]:
    return request.param[0], on_two_ranks(distributed, *request.param)


@pytest.mark.parametrize("name", SGD)
def test_ranks_equal_simulated_workers(run: tuple[bool, list[dict[str, Any]]], name: str) -> None:
    accumulated, ranks = run
    for rank in ranks:
        for own, expected in zip(rank[name]["outside"], simulated(name, accumulated), strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", SGD)
def test_ranks_agree_outside_and_differ_inside_where_they_are_to(
    run: tuple[bool, list[dict[str, Any]]], name: str
) -> None:
    one, two = (rank[name] for rank in run[1])
    assert all(torch.equal(a, b) for a, b in zip(one["outside"], two["outside"], strict=True))
    for t, (a, b) in enumerate(zip(one["inside"], two["inside"], strict=True)):
        assert torch.equal(a, b) == (t == 0 or name not in NEEDS)  # the first step is plain


def test_each_rank_is_displaced_by_its_own_last_gradient(run: tuple[bool, list[dict[str, Any]]]) -> None:
    for rank in run[1]:
        found = rank["heavy ball"]
        for displacement, gradient in zip(found["inside"][1:], found["expected"], strict=False):
            torch.testing.assert_close(displacement, -0.05 * gradient, rtol=1e-9, atol=1e-13)
        for name in ("heavy ball", "local"):
            state = flat(s["local_gradient"] for s in rank[name]["state"])
            torch.testing.assert_close(state, rank[name]["expected"][-1], rtol=1e-12, atol=1e-13)


def test_state_of_each_rank_is_its_own(run: tuple[bool, list[dict[str, Any]]]) -> None:
    one, two = (rank["local"]["state"] for rank in run[1])
    for a, b in zip(one, two, strict=True):
        assert not torch.allclose(a["local_gradient"], b["local_gradient"])
        assert torch.equal(a["velocity"], b["velocity"])


def resumed(rank: int) -> dict[str, Any]:
    """Bitwise resuming from each rank's own file, noise of ranks, and what is refused under the wrapper."""
    found: dict[str, Any] = {}

    def train(model: Any, optimizer: Any, steps: range) -> None:
        for t in steps:
            with optimizer.extrapolated():
                loss_of(model, batch(t, rank)).backward()
            optimizer.step()
            optimizer.zero_grad()

    def build() -> tuple[nn.Module, Any, Any]:
        model = network()
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = built("local", model)
        optimizer.keep_local_gradients(wrapped)
        return model, wrapped, optimizer

    model, wrapped, optimizer = build()
    train(wrapped, optimizer, range(3))
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    saved = torch.load(_file(saved), weights_only=True)
    train(wrapped, optimizer, range(3, 6))
    other, other_wrapped, other_optimizer = build()
    other.load_state_dict(saved["model"])
    other_optimizer.load_state_dict(saved["optimizer"])
    assert not other_optimizer.needs_local_gradients  # the hook is still there
    train(other_wrapped, other_optimizer, range(3, 6))
    found["resumed"] = torch.equal(flat(model.parameters()), flat(other.parameters()))

    plain = network()
    noisy = ExtrapolatedSGD(plain.parameters(), perturb="isotropic", momentum=0.0, lr=0.5)
    before = [p.detach().clone() for p in plain.parameters()]
    with noisy.extrapolated():
        for index, (p, w) in enumerate(zip(plain.parameters(), before, strict=True)):
            generator = torch.Generator().manual_seed(seed_for(0, 0, rank, 0, index))
            xi = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            torch.testing.assert_close(p.detach(), w + 0.5 * xi, rtol=1e-14, atol=1e-14)
    found["noise"] = float(xi[0])

    for label, call in {
        "second hook": lambda: built("local", model).keep_local_gradients(wrapped),
        "workers": lambda: built("local", model, workers=2).keep_local_gradients(wrapped),
    }.items():
        with pytest.raises(InvalidArgument) as caught:
            call()
        found[label] = str(caught.value)

    for part in range(2):  # synchronised twice
        with optimizer.extrapolated():
            loss_of(wrapped, batch(9, rank, part)).backward()
    weights = flat(model.parameters())
    with pytest.raises(StepError) as error:
        optimizer.step()
    found["twice"] = str(error.value)
    assert torch.equal(flat(model.parameters()), weights)
    optimizer.zero_grad()
    with wrapped.no_sync(), optimizer.extrapolated():
        loss_of(wrapped, batch(9, rank)).backward()
    with pytest.raises(StepError) as error:
        optimizer.step()
    found["never"] = str(error.value)
    optimizer.zero_grad()
    train(wrapped, optimizer, range(1))
    return found


def _file(value: Any) -> Any:
    import io

    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_resuming_noise_and_refusals() -> None:
    one, two = on_two_ranks(resumed)
    assert one["resumed"]
    assert two["resumed"]
    assert one["noise"] != two["noise"]
    assert one["second hook"] == "model has a communication hook already, and there can be only one"
    assert one["workers"].startswith("workers must be 1 under DistributedDataParallel")
    assert "averaged over ranks twice" in one["twice"]
    assert "no_sync()" in one["twice"]
    assert "no local gradient was seen" in one["never"]


def sharded(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    mesh = init_device_mesh("cpu", (2,))

    def local(t: Tensor) -> Tensor:
        return t.to_local() if isinstance(t, DTensor) else t

    for name, options in {
        "global": {"perturb": "past_global"},
        "plain": {"extrapolation": 0.0, "perturb": "filter"},
        "precond": {},
        "filter rms": {"perturb": "filter"},
        "filter norm": {"perturb": "filter", "filter_norm": "norm"},
        "filter match": {"perturb": "filter", "filter_norm": "match"},
        "isotropic": {"perturb": "isotropic"},
    }.items():
        kind: Any = ExtrapolatedAdam if name == "precond" else ExtrapolatedSGD
        model, twin = network(), network()
        fully_shard(model, mesh=mesh)
        optimizer, other = (kind(m.parameters(), lr=0.05, **options) for m in (model, twin))
        assert not optimizer.needs_local_gradients
        assert not optimizer.own_state
        gaps = []
        for t in range(4):
            before = [local(p).clone() for p in model.parameters()]
            with optimizer.extrapolated():
                moved = [local(p).clone() for p in model.parameters()]
                loss_of(model, batch(t, rank)).backward()
            gaps += [
                float((a - b).detach().abs().max()) if a.numel() else 1.0 for a, b in zip(before, moved, strict=True)
            ]
            assert all(torch.equal(a, local(p)) for a, p in zip(before, model.parameters(), strict=True))
            optimizer.step()
            optimizer.zero_grad()
            if "filter" not in name and name != "isotropic":
                with other.extrapolated():
                    ((loss_of(twin, batch(t, 0)) + loss_of(twin, batch(t, 1))) / 2).backward()
                other.step()
                other.zero_grad()
        if "filter" not in name and name != "isotropic":
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(p.full_tensor(), q, rtol=1e-12, atol=1e-13)  # type: ignore[attr-defined]
        else:  # the first displacement, from the definition
            noise = ExtrapolatedSGD(model.parameters(), momentum=0.0, lr=0.05, **options)
            for index, p in enumerate(model.parameters()):
                w, part = p.full_tensor().detach(), local(p).detach().clone()  # type: ignore[attr-defined]
                with noise.extrapolated():
                    displacement = local(p).detach() - part
                generator = torch.Generator().manual_seed(seed_for(0, 0, rank, 0, index))
                xi = torch.randn(part.shape, generator=generator, dtype=part.dtype)
                whole = xi.square().sum()
                dist.all_reduce(whole)
                rows = part.flatten(1) if part.ndim > 1 else w
                sizes = rows.norm(dim=-1)
                sizes = {
                    "isotropic": torch.ones_like(sizes), "filter rms": sizes / rows.shape[-1] ** 0.5,
                    "filter norm": sizes, "filter match": sizes / (xi.norm(dim=1) if xi.ndim > 1 else whole.sqrt()),
                }[name]  # fmt: skip
                expected = 0.05 * xi * (sizes[:, None] if part.ndim > 1 else sizes)
                torch.testing.assert_close(displacement, expected, rtol=1e-9, atol=1e-14)
        found[name] = min(gaps[len(before) :])

    columns = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]))
    copies = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Replicate()]))
    for label, params, make in [
        ("local", [columns], lambda p: ExtrapolatedSGD(p)),
        ("grad", [columns], lambda p: ExtrapolatedAdam(p, direction="grad")),
        ("columns", [copies, columns], lambda p: ExtrapolatedSGD(p, perturb="filter")),
    ]:
        with pytest.raises(InvalidArgument) as caught:
            make(params)
        found[label] = str(caught.value)
    ExtrapolatedSGD([copies], perturb="filter")
    return found


def test_sharded_parameters() -> None:
    for found in on_two_ranks(sharded):
        assert "perturb='past_local' needs each rank's own gradient" in found["local"]
        assert "parameter 0 of its group, of shape (4, 4): use perturb='filter' or 'past_global'" in found["local"]
        assert "use direction='precond', or DistributedDataParallel" in found["grad"]
        assert "perturb='filter' needs whole filters, got placements (Shard(dim=1),)" in found["columns"]
        assert "for parameter 1 of its group" in found["columns"]
        for name in ("global", "plain", "precond", "isotropic", "filter rms", "filter norm", "filter match"):
            assert found[name] > 0
