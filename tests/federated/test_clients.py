"""How data is split among clients, and what they send."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from adadagrad.core.errors import InvalidArgument, InvalidData, UnknownName
from adadagrad.federated.clients import LocalWork, batches, client_message, dirichlet_split

LABELS = torch.arange(2000) % 10


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def data(count: int = 23) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(count, 6, generator=generator, dtype=torch.float64), torch.arange(count) % 3)


def model(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), *layers, nn.Tanh(), nn.Linear(5, 3)).double()


def send(net: nn.Module, dataset: Dataset[Any], work: LocalWork, **numbers: int) -> dict[str, Tensor]:
    return client_message(net, dataset, work, mean_loss, **({"seed": 0, "round_number": 1, "client": 0} | numbers))


@pytest.mark.parametrize("concentration", [0.01, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("clients", [1, 7, 50, 500])
def test_every_example_has_one_client_and_every_client_an_example(concentration: float, clients: int) -> None:
    parts = dirichlet_split(LABELS, clients, concentration)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(2000))
    assert min(len(part) for part in parts) >= 1


def test_concentration_says_how_alike_clients_are() -> None:
    def classes(concentration: float) -> float:
        """The mean share of a client's most frequent class."""
        parts = dirichlet_split(LABELS, 20, concentration, seed=1)
        return sum(LABELS[p].bincount().max().item() / len(p) for p in parts) / 20

    assert classes(100.0) < 0.2 < 0.4 < classes(0.1)


def test_the_split_is_a_function_of_its_seed() -> None:
    one, two = dirichlet_split(LABELS, 5, 0.5, seed=3), dirichlet_split(LABELS, 5, 0.5, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    other = dirichlet_split(LABELS, 5, 0.5, seed=4)
    assert any(len(a) != len(b) or not torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_shares_have_the_moments_of_a_dirichlet_distribution() -> None:
    """With one class the sizes are n times the shares: mean 1/N, variance (N - 1) / N^2 / (N a + 1)."""
    labels, count, a = torch.zeros(5000, dtype=torch.int64), 4, 0.5
    shares = torch.tensor([[len(p) / 5000 for p in dirichlet_split(labels, count, a, seed=s)] for s in range(400)])
    assert shares.mean(0).tolist() == pytest.approx([0.25] * 4, abs=0.05)
    assert shares.var().item() == pytest.approx((count - 1) / count**2 / (count * a + 1), rel=0.1)


def test_a_gradient_is_that_of_the_mean_over_all_examples_whatever_the_batches() -> None:
    net, whole = model(), data()
    mean_loss(net, whole.tensors).backward()
    expected = {name: p.grad for name, p in net.named_parameters()}
    for size in (1, 5, 23, 64):
        sent = send(model(), whole, LocalWork(batch_size=size))
        for name, grad in expected.items():
            torch.testing.assert_close(sent[name], grad, rtol=1e-12, atol=1e-14)


def test_a_drift_of_one_full_step_is_the_rate_times_the_gradient() -> None:
    gradient = send(model(), data(), LocalWork(batch_size=64))
    drift = send(model(), data(), LocalWork(message="drift", lr=0.3, batch_size=64))
    for name in gradient:
        torch.testing.assert_close(drift[name], 0.3 * gradient[name], rtol=1e-9, atol=1e-12)


def test_a_drift_equals_gradient_descent_by_torch() -> None:
    sent = send(model(), data(), LocalWork(message="drift", epochs=3, lr=0.2, batch_size=4), seed=5, client=2)
    net, start = model(), model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    orders: list[Tensor] = []
    for epoch in range(3):
        from adadagrad.core.mixing import seed_for

        orders.append(torch.randperm(23, generator=torch.Generator().manual_seed(seed_for(5, 1, 2, epoch) >> 1)))
        for rows in orders[-1].split(4):
            optimizer.zero_grad()
            mean_loss(net, [t[rows] for t in data().tensors]).backward()
            optimizer.step()
    for (name, before), after in zip(start.named_parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(sent[name], (before - after).detach(), rtol=1e-10, atol=1e-14)


def test_every_option_of_the_work_and_every_number_changes_a_drift() -> None:
    base = LocalWork(message="drift", batch_size=4)
    one = send(model(), data(), base)["0.weight"]
    assert torch.equal(one, send(model(), data(), base)["0.weight"])
    others = [
        send(model(), data(), LocalWork(message="drift", batch_size=4, epochs=2)),
        send(model(), data(), LocalWork(message="drift", batch_size=4, lr=0.2)),
        send(model(), data(), LocalWork(message="drift", batch_size=5)),
        send(model(), data(), base, seed=1),
        send(model(), data(), base, round_number=2),
        send(model(), data(), base, client=1),
    ]
    assert all(not torch.equal(one, other["0.weight"]) for other in others)


@pytest.mark.parametrize("message", ["gradient", "drift"])
def test_model_and_random_state_are_left_alone(message: Any) -> None:
    net = model(nn.Dropout(0.5))
    net[0].weight.requires_grad_(False)
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    sent = send(net, data(), LocalWork(message=message))
    assert set(sent) == {"0.bias", "3.weight", "3.bias"}
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in net.parameters())
    torch.manual_seed(77)
    again = send(net, data(), LocalWork(message=message))
    assert torch.equal(sent["3.weight"], again["3.weight"]), "dropout must not depend on torch's own generator"
    other = send(net, data(), LocalWork(message=message), client=1)
    assert not torch.equal(sent["3.weight"], other["3.weight"])


def test_a_data_set_derived_from_tensors_is_asked_for_its_examples() -> None:
    class Silent(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            return 0 * x, y

    silent = Silent(*data().tensors)
    for dataset in (silent, Subset(silent, list(range(10)))):
        assert all(batch[0].abs().sum() == 0 for batch in batches(dataset, torch.arange(10), 4))


def test_a_half_precision_gradient_is_added_up_in_float32() -> None:
    """The small batches' gradients, each a 1/500 of the whole, would vanish beside the sum in bfloat16."""
    net = nn.Linear(1, 1, bias=False).bfloat16()
    ones = TensorDataset(torch.ones(500, 1, dtype=torch.bfloat16))
    sent = client_message(
        net, ones, LocalWork(batch_size=1), lambda m, b: m(b[0]).mean(), seed=0, round_number=1, client=0
    )
    assert sent["weight"].dtype == torch.bfloat16
    assert sent["weight"].item() == pytest.approx(1.0, rel=0.01)


def test_batches_are_the_same_by_indexing_and_by_collation() -> None:
    class Plain(Dataset[Any]):
        def __len__(self) -> int:
            return 23

        def __getitem__(self, index: int) -> Any:
            return tuple(t[index] for t in data().tensors)

    order = torch.randperm(20)
    by_tensors = list(batches(data(), order, 6))
    by_subset = list(batches(Subset(data(), list(range(20))), order, 6))
    by_items = list(batches(Plain(), order, 6))
    assert [len(b[1]) for b in by_tensors] == [6, 6, 6, 2]
    for one, two, three in zip(by_tensors, by_subset, by_items, strict=True):
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, three, strict=True))


def test_mistakes() -> None:
    with pytest.raises(InvalidArgument, match="num_clients must be at most the 2000 examples"):
        dirichlet_split(LABELS, 2001, 0.1)
    with pytest.raises(InvalidArgument, match="concentration must be > 0, got 0"):
        dirichlet_split(LABELS, 2, 0)
    with pytest.raises(InvalidArgument, match=r"labels must be a vector of integers, got torch\.float32 of shape"):
        dirichlet_split(LABELS.float(), 2, 0.1)
    with pytest.raises(InvalidArgument, match="num_clients must be >= 1"):
        dirichlet_split(LABELS, 0, 0.1)
    with pytest.raises(InvalidData, match="client 0 has no example"):
        send(model(), Subset(data(), []), LocalWork())
    with pytest.raises(UnknownName, match="message"):
        LocalWork(message="weights")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="epochs must be >= 1"):
        LocalWork(epochs=0)
    with pytest.raises(InvalidArgument, match="lr must be > 0"):
        LocalWork(lr=0.0)
    with pytest.raises(InvalidArgument, match="batch_size must be >= 1"):
        LocalWork(batch_size=0)
