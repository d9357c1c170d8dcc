"""The channel: a plain mean where nothing disturbs it, the moments of its fading, the place and law of its noise."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import Tensor

from adadagrad.core.errors import InvalidArgument, UnknownName
from adadagrad.federated import channel as channel_module
from adadagrad.federated.channel import Channel

QUIET = Channel(scale=0.0, fading="none")


def messages(count: int = 4, size: int = 5) -> dict[int, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return {
        n: {
            "w": torch.randn(size, generator=generator, dtype=torch.float64),
            "b": torch.randn(2, 2, generator=generator, dtype=torch.float64),
        }
        for n in range(count)
    }


def test_nothing_disturbed_is_the_mean() -> None:
    sent = messages()
    heard = QUIET.aggregate(sent, 1)
    for name in ("w", "b"):
        expected = torch.stack([m[name] for m in sent.values()]).mean(0)
        torch.testing.assert_close(heard[name], expected, rtol=1e-15, atol=1e-15)


def test_fading_is_one_number_for_each_client_and_round() -> None:
    sent = messages()
    channel = Channel(scale=0.0, seed=3)
    heard = channel.aggregate(sent, 7)
    gains = [channel.fading_of(n, 7) for n in sent]
    assert len(set(gains)) == 4
    for name in ("w", "b"):
        expected = sum(g * m[name] for g, m in zip(gains, sent.values(), strict=True)) / 4
        torch.testing.assert_close(heard[name], expected, rtol=1e-14, atol=1e-14)
    assert channel.fading_of(0, 8) != gains[0]
    assert Channel(scale=0.0, seed=4).fading_of(0, 7) != gains[0]


def test_moments_of_the_fading() -> None:
    gains = torch.tensor([Channel(seed=1).fading_of(n, t) for n in range(200) for t in range(200)], dtype=torch.float64)
    variance = (4 - math.pi) / math.pi
    assert variance == pytest.approx(0.27324, abs=1e-5)
    assert gains.mean().item() == pytest.approx(1.0, abs=4 * math.sqrt(variance / len(gains)))
    assert gains.var().item() == pytest.approx(variance, abs=4 * 0.45 / math.sqrt(len(gains)))
    assert gains.min() >= 0
    below_one = 1 - math.exp(-math.pi / 4)  # the distribution function of a Rayleigh variable of mean 1
    assert (gains < 1).double().mean().item() == pytest.approx(below_one, abs=4 * 0.5 / math.sqrt(len(gains)))
    rows = gains.reshape(200, 200)
    assert torch.corrcoef(rows[:2]).abs()[0, 1] < 4 / math.sqrt(200)


@pytest.mark.parametrize("alpha", [1.3, 2.0])
def test_noise_is_that_of_the_formula_added_after_the_division(alpha: float) -> None:
    sent = {n: {"w": torch.zeros(200_000, dtype=torch.float64)} for n in range(10)}
    heard = Channel(alpha=alpha, scale=0.1, seed=2).aggregate(sent, 1)["w"]
    for tau in (1.0, 10.0):
        assert torch.cos(tau * heard).mean().item() == pytest.approx(math.exp(-((0.1 * tau) ** alpha)), abs=0.006)
    weaker = Channel(alpha=alpha, scale=0.1, seed=2, noise_on="sum").aggregate(sent, 1)["w"]
    torch.testing.assert_close(10 * weaker, heard, rtol=1e-12, atol=0)


def test_noise_is_independent_for_each_coordinate_round_and_tensor() -> None:
    channel = Channel(alpha=2.0)
    first = channel.noise_like({"w": torch.zeros(1000), "b": torch.zeros(1000)}, 1)
    again = channel.noise_like({"w": torch.zeros(1000)}, 2)
    stacked = torch.stack([first["w"], first["b"], again["w"], first["w"].roll(1)])
    off = torch.corrcoef(stacked) - torch.eye(4)
    assert off.abs().max() < 5 / math.sqrt(1000)


def test_draws_depend_on_seed_round_and_client_alone() -> None:
    """Another order of arrival, another channel object, and a client less: the others' draws stay."""
    sent = messages()
    channel = Channel(seed=5)
    heard = channel.aggregate(sent, 3)
    backwards = pickle.loads(pickle.dumps(channel)).aggregate(dict(reversed(sent.items())), 3)
    assert all(torch.equal(heard[name], backwards[name]) for name in heard)
    assert not torch.equal(heard["w"], channel.aggregate(sent, 4)["w"])
    torch.manual_seed(9)  # torch's own generator has nothing to do with it
    assert torch.equal(heard["w"], channel.aggregate(sent, 3)["w"])
    fewer = {n: m for n, m in sent.items() if n != 2}
    noise = channel.noise_like(sent[0], 3)
    expected = sum(channel.fading_of(n, 3) * m["w"] for n, m in fewer.items()) / 3 + noise["w"]
    torch.testing.assert_close(channel.aggregate(fewer, 3)["w"], expected, rtol=1e-14, atol=1e-14)


def test_messages_are_left_alone_and_their_dtype_is_kept() -> None:
    sent = {0: {"w": torch.ones(3)}, 1: {"w": torch.ones(3)}}
    heard = Channel().aggregate(sent, 1)
    assert heard["w"].dtype == torch.float32
    assert torch.equal(sent[0]["w"], torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_added_up_in_float32(dtype: torch.dtype) -> None:
    """A thousand ones are one on average, and a thousand hundreds no infinity."""
    for value in (1.0, 100.0):
        sent = {n: {"w": torch.full((3,), value, dtype=dtype)} for n in range(1000)}
        heard = QUIET.aggregate(sent, 1)["w"]
        assert heard.dtype == dtype
        assert heard.tolist() == pytest.approx([value] * 3, rel=1e-3)


def test_sharded_messages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "all_plain", lambda tensors: False)
    with pytest.raises(InvalidArgument, match=r"plain tensors, got a DTensor: send its full_tensor\(\)"):
        QUIET.aggregate(messages(), 1)


def test_mistakes() -> None:
    for alpha in (1.0, 0.5, 2.5, math.nan, "2"):
        with pytest.raises(InvalidArgument, match="alpha must be above 1 and at most 2"):
            Channel(alpha=alpha)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=r"scale must be >= 0, got -0\.1"):
        Channel(scale=-0.1)
    with pytest.raises(UnknownName, match="fading"):
        Channel(fading="ricean")  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="noise_on"):
        Channel(noise_on="both")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="seed must be >= 0"):
        Channel(seed=-1)
    with pytest.raises(InvalidArgument, match="messages must hold at least one client's"):
        QUIET.aggregate({}, 1)
    with pytest.raises(InvalidArgument, match=r"got \{w: \(1,\)\} from client 0 and \{w: \(2,\)\}"):
        QUIET.aggregate({0: {"w": torch.ones(1)}, 1: {"w": torch.ones(2)}}, 1)
