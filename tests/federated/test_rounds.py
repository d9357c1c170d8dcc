"""Whole rounds: the server's step, clients that drop out, resume, and the estimate of the tail."""

from __future__ import annotations

import copy
import io
import logging
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from adadagrad.core.errors import InvalidArgument, InvalidData, InvalidMeasurement
from adadagrad.federated import (
    Channel,
    LocalWork,
    ResidualTail,
    Server,
    client_message,
    estimate_tail,
    sample_alpha_stable,
    simulate,
)
from adadagrad.federated.simulation import asked_clients
from adadagrad.optimizers.over_the_air import OverTheAirAdaGrad, OverTheAirAdam


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def make_server(channel: Channel | None = None, **options: Any) -> Server:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return Server(model, OverTheAirAdam(model.parameters(), 0.05), channel, **options)


def make_clients(count: int = 6) -> list[Subset[Any]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 6, generator=generator, dtype=torch.float64)
    data = TensorDataset(x, (x[:, :3]).argmax(1))
    return [Subset(data, list(range(n * 20, n * 20 + 5 + n))) for n in range(count)]


def weights(server: Server) -> Tensor:
    return torch.cat([p.detach().flatten() for p in server.model.parameters()])


def test_a_round_is_the_channel_and_then_the_optimizer() -> None:
    channel = Channel(seed=4)
    server, other = make_server(channel), make_server()
    records = simulate(server, make_clients(), mean_loss, rounds=3, seed=2)
    for number in (1, 2, 3):
        sent = {
            n: client_message(other.model, c, LocalWork(), mean_loss, seed=2, round_number=number, client=n)
            for n, c in enumerate(make_clients())
        }
        heard = channel.aggregate(sent, number)
        for name, param in other.model.named_parameters():
            param.grad = heard[name]
        other.optimizer.step()
        assert records[number - 1].grad_norm == pytest.approx(math.sqrt(sum(h.square().sum() for h in heard.values())))
    assert torch.equal(weights(server), weights(other))
    assert [r.answered for r in records] == [(0, 1, 2, 3, 4, 5)] * 3
    assert all(p.grad is None for p in server.model.parameters())


def test_it_learns_through_heavy_tails_where_plain_averaging_does_not() -> None:
    """Not a claim about methods, which benchmarks compare: the loop as a whole descends."""
    clients, channel = make_clients(), Channel(alpha=1.5, scale=0.02, seed=1)
    server = make_server(channel)

    def loss() -> float:
        return sum(mean_loss(server.model, c[list(range(len(c)))]).item() for c in clients) / len(clients)

    first = loss()
    simulate(server, clients, mean_loss, rounds=100)
    assert loss() < 0.5 * first


def test_drifts_are_taken_for_gradients() -> None:
    torch.manual_seed(0)
    server = make_server()
    server.optimizer = torch.optim.SGD(server.model.parameters(), lr=1.0)
    start = weights(server)
    work = LocalWork(message="drift", lr=0.1, batch_size=4)
    own = [
        client_message(server.model, c, work, mean_loss, seed=0, round_number=1, client=n)
        for n, c in enumerate(make_clients())
    ]
    simulate(server, make_clients(), mean_loss, rounds=1, work=work)
    mean = sum(torch.cat([m.flatten() for m in message.values()]) for message in own) / len(own)
    torch.testing.assert_close(weights(server), start - mean, rtol=1e-12, atol=1e-14)  # federated averaging


def test_a_client_that_drops_out_is_left_out_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    server, without = make_server(Channel()), make_server(Channel())
    with caplog.at_level(logging.WARNING, logger="adadagrad.federated"):
        records = simulate(
            server, make_clients(), mean_loss, rounds=2, drops_out=lambda number, client: (number, client) == (1, 3)
        )
    assert records[0].answered == (0, 1, 2, 4, 5)
    assert records[0].asked == (0, 1, 2, 3, 4, 5)
    assert records[0].left_out == {3: "no message"}
    assert records[1].left_out == {}
    assert "round 1: client 3 is left out: no message" in caplog.text
    assert weights(server).isfinite().all()
    sent = {
        n: client_message(without.model, c, LocalWork(), mean_loss, seed=0, round_number=1, client=n)
        for n, c in enumerate(make_clients())
        if n != 3
    }
    without.finish_round(1, sent)
    simulate(without, make_clients(), mean_loss, rounds=1, first_round=2)
    assert torch.equal(weights(server), weights(without))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda m: {**m, "0.bias": m["0.bias"] * math.nan}, "0.bias is not finite"),
        (lambda m: {**m, "0.bias": m["0.bias"] / 0}, "0.bias is not finite"),
        (lambda m: {**m, "0.bias": torch.ones(4)}, r"0.bias has shape \(4,\), not \(5,\)"),
        (lambda m: {k: v for k, v in m.items() if k != "2.bias"}, "names differ from the model's at 2.bias"),
        (lambda m: {**m, "other": torch.ones(1)}, "names differ from the model's at other"),
    ],
)
def test_a_message_that_does_not_fit_is_left_out(spoil: Any, reason: str) -> None:
    server, without = make_server(Channel()), make_server(Channel())
    sent = {
        n: client_message(server.model, c, LocalWork(), mean_loss, seed=0, round_number=1, client=n)
        for n, c in enumerate(make_clients())
    }
    record = server.finish_round(1, {**sent, 2: spoil(sent[2])})
    assert list(record.left_out) == [2]
    assert pytest.importorskip("re").fullmatch(reason, record.left_out[2])
    without.finish_round(1, {n: m for n, m in sent.items() if n != 2})
    assert torch.equal(weights(server), weights(without))


def test_a_number_too_large_for_the_model_is_not_finite() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    server = Server(model, torch.optim.SGD(model.parameters(), lr=0.1))
    large = {name: torch.full(p.shape, 1e300, dtype=torch.float64) for name, p in model.named_parameters()}
    fine = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    record = server.finish_round(1, {0: large, 1: fine}, asked=[0, 1, 2, 3], reasons={3: "its battery is empty"})
    assert record.left_out == {0: "weight is not finite", 2: "no message", 3: "its battery is empty"}
    assert record.answered == (1,)


def test_noise_beyond_the_dtype_leaves_the_model_alone(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = OverTheAirAdam(model.parameters(), 0.1)
    server = Server(model, optimizer, Channel(scale=3e38, seed=1), follow_tail=True)
    before = weights(server)
    large = {name: torch.full_like(p, 3e38) for name, p in model.named_parameters()}
    record = server.finish_round(1, {0: large})
    assert record.grad_norm is None
    assert record.answered == (0,)
    assert torch.equal(before, weights(server))
    assert server.tail is not None
    assert server.tail.state_dict()["last"] is None
    assert "round 1: what was heard is not finite, the model stays as it is" in caplog.text


def test_a_state_without_a_tail_forgets_the_one_that_was_followed() -> None:
    server = make_server(Channel(scale=0.5), follow_tail=True)
    simulate(server, make_clients(), mean_loss, rounds=4)
    assert server.tail is not None
    assert server.tail.count > 0
    server.load_state_dict(make_server().state_dict())
    assert server.tail.count == 0


def test_frozen_parameters_may_be_in_the_optimizer() -> None:
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    server = Server(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = model.bias.clone()
    server.finish_round(1, {0: {"weight": torch.ones(1, 2)}})
    assert torch.equal(before, model.bias)


def test_a_round_in_which_nobody_answers_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    server = make_server(Channel())
    simulate(server, make_clients(), mean_loss, rounds=2)
    before, state = weights(server), copy.deepcopy(server.optimizer.state_dict())
    record = simulate(server, make_clients(), mean_loss, rounds=1, first_round=3, drops_out=lambda *_: True)[0]
    assert record.answered == ()
    assert record.grad_norm is None
    assert torch.equal(before, weights(server))
    assert all(
        torch.equal(state["state"][k][n], v)
        for k, values in server.optimizer.state_dict()["state"].items()
        for n, v in values.items()
    )
    assert "round 3: no message could be used, the model stays as it is" in caplog.text


@pytest.mark.parametrize("cut", [0, 1, 4, 5, 10])
def test_a_run_that_is_cut_and_resumed_hears_the_same_noise(cut: int) -> None:
    whole = make_server(Channel(scale=0.05), follow_tail=True)
    simulate(whole, make_clients(), mean_loss, rounds=10, fraction=0.5)
    first = make_server(Channel(scale=0.05), follow_tail=True)
    simulate(first, make_clients(), mean_loss, rounds=cut, fraction=0.5)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make_server(Channel(scale=0.05), follow_tail=True)
    second.load_state_dict(torch.load(file, weights_only=True))
    simulate(second, make_clients(), mean_loss, rounds=10 - cut, first_round=cut + 1, fraction=0.5)
    assert torch.equal(weights(whole), weights(second))
    assert whole.tail is not None
    assert second.tail is not None
    assert whole.tail.count == second.tail.count


def test_a_fraction_of_the_clients() -> None:
    chosen = [asked_clients(10, 0.3, 0, number) for number in range(400)]
    assert {len(c) for c in chosen} == {3}
    assert all(c == tuple(sorted(set(c))) for c in chosen)
    counts = torch.tensor([n for c in chosen for n in c]).bincount(minlength=10)
    assert counts.min() > 80
    assert counts.max() < 160
    assert asked_clients(10, 0.001, 0, 1) == asked_clients(10, 0.1, 0, 1)
    assert len(asked_clients(10, 0.001, 0, 1)) == 1
    assert asked_clients(10, 0.3, 1, 1) != asked_clients(10, 0.3, 0, 1) or asked_clients(10, 0.3, 1, 2) != chosen[2]


@pytest.mark.parametrize("alpha", [1.1, 1.5, 1.9, 2.0])
def test_the_tail_estimate_is_right_within_its_errors(alpha: float) -> None:
    found = [
        estimate_tail(sample_alpha_stable((20_000,), alpha, 0.3, generator=torch.Generator().manual_seed(seed)))
        for seed in range(40)
    ]
    indices = torch.tensor([f.alpha for f in found])
    errors = torch.tensor([f.alpha_error for f in found])
    if alpha < 2:
        assert indices.mean().item() == pytest.approx(alpha, abs=4 * errors.mean().item() / math.sqrt(40))
        assert indices.std().item() == pytest.approx(errors.mean().item(), rel=0.4)
    assert indices.max() <= 2
    assert sum(f.scale for f in found) / 40 == pytest.approx(0.3, rel=0.02)


def test_the_logarithms_have_the_moments_of_the_estimator() -> None:
    for alpha in (1.2, 1.7):
        x = sample_alpha_stable((400_000,), alpha, 0.5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        logs = x.abs().log()
        assert logs.var().item() == pytest.approx(math.pi**2 / 6 * (1 / alpha**2 + 0.5), rel=0.01)
        assert logs.mean().item() == pytest.approx(0.5772156649 * (1 / alpha - 1) + math.log(0.5), abs=0.01)


@pytest.mark.parametrize("alpha", [1.2, 1.8])
def test_the_server_follows_the_tail_of_its_channel(alpha: float) -> None:
    server = make_server(Channel(alpha=alpha, scale=0.5, fading="none", seed=3), follow_tail=True)
    assert server.optimizer.param_groups[0]["alpha"] == 1.5
    records = simulate(server, make_clients(), mean_loss, rounds=200)
    tail = records[-1].tail
    assert tail is not None
    assert tail.alpha == pytest.approx(alpha, abs=4 * tail.alpha_error)
    assert tail.alpha_error < 0.08
    assert tail.scale == pytest.approx(0.5, rel=0.1)
    assert server.optimizer.param_groups[0]["alpha"] == tail.usable_alpha
    assert tail.count == 100 * sum(p.numel() for p in server.model.parameters())
    assert records[0].tail is None


def test_running_statistics_that_stay_are_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.warns(UserWarning, match="the running statistics of 1 stay as they are"):
        Server(model, torch.optim.SGD(model.parameters(), lr=0.1))
    still = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    Server(still, torch.optim.SGD(still.parameters(), lr=0.1))  # a warning would be an error here


def test_usable_alpha_stays_in_the_optimizer_s_range() -> None:
    cauchy = estimate_tail(sample_alpha_stable((10_000,), 0.7, 1.0, generator=torch.Generator().manual_seed(1)))
    assert cauchy.alpha == pytest.approx(0.7, abs=0.05)
    assert cauchy.usable_alpha == 1.01
    flat = estimate_tail(torch.linspace(-1, 1, 1001))  # lighter tails than any stable noise
    assert flat.alpha == flat.usable_alpha == 2.0


def test_mistakes() -> None:
    server = make_server()
    with pytest.raises(InvalidArgument, match="optimizer trains parameters that are not the model's"):
        Server(server.model, torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    frozen = nn.Linear(1, 1).requires_grad_(False)
    with pytest.raises(InvalidArgument, match="model must have a parameter that requires a gradient"):
        Server(frozen, torch.optim.SGD(frozen.parameters(), lr=0.1))
    with pytest.raises(InvalidArgument, match="follow_tail needs an optimizer with an alpha"):
        Server(server.model, torch.optim.SGD(server.model.parameters(), lr=0.1), follow_tail=True)
    Server(server.model, OverTheAirAdaGrad(server.model.parameters(), 0.1), follow_tail=True)
    with pytest.raises(InvalidArgument, match="clients must hold at least one"):
        simulate(server, [], mean_loss, rounds=1)
    with pytest.raises(InvalidData, match="client 1 has no example"):
        simulate(server, [make_clients()[0], Subset(make_clients()[0], [])], mean_loss, rounds=1)
    for fraction in (0.0, 1.1, -1, math.nan):
        with pytest.raises(InvalidArgument, match="fraction must be above 0 and at most 1"):
            simulate(server, make_clients(), mean_loss, rounds=1, fraction=fraction)
    with pytest.raises(InvalidArgument, match="rounds must be >= 0"):
        simulate(server, make_clients(), mean_loss, rounds=-1)
    with pytest.raises(InvalidMeasurement, match="at least 100 residuals that are not zero, got 3"):
        estimate_tail(torch.tensor([0.0, 1.0, 2.0, 3.0, math.inf]))
    with pytest.raises(InvalidMeasurement, match="got 0"):
        ResidualTail().estimate()
