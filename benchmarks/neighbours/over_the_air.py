"""Federated rounds through a heavy-tailed channel: plain averaging, momentum, AdaGrad with power 2, and the -OTA steps.

    python -m benchmarks.neighbours.over_the_air [--seeds 5] [--rounds 200] [--data digits|mnist:DIR]

Softmax regression, 50 clients, a Dirichlet(0.1) split, one full local gradient a round from each, Rayleigh fading of
mean 1, noise of scale 0.1 on the mean, tail index 1.1, 1.5 and 1.9. Every method has its own learning rate, the best of
a grid on the validation part with seeds 100 to 102, which no reported run has; the grid goes on where the best is at
its end. Adam-OTA and AdaGrad-OTA take the channel's tail index as their power; the rows below them take the one that
they estimate, and one that is wrong. A seed stands for split, weights and channel.

A round is computed as one weighted gradient over all examples, sum_n h_n / N grad f_n, which is what the channel makes
of the clients' messages; `tests/benchmarks/test_over_the_air.py` holds it to `adadagrad.federated.simulate`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadagrad.cli.data import load_data
from adadagrad.federated import Channel, ResidualTail, dirichlet_split
from adadagrad.optimizers import OverTheAirAdaGrad, OverTheAirAdam
from benchmarks.companions.kept import spread, table
from benchmarks.machine import machine, write_json

Make = Callable[[list[nn.Parameter], float, float], torch.optim.Optimizer]
METHODS: Mapping[str, Make] = {
    "FedAvg": lambda params, lr, tail: torch.optim.SGD(params, lr=lr),
    "FedAvgM": lambda params, lr, tail: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "AdaGrad, power 2": lambda params, lr, tail: OverTheAirAdaGrad(params, lr, 2.0),
    "AdaGrad-OTA": lambda params, lr, tail: OverTheAirAdaGrad(params, lr, tail),
    "Adam, power 2": lambda params, lr, tail: OverTheAirAdam(params, lr, 2.0),
    "Adam-OTA": lambda params, lr, tail: OverTheAirAdam(params, lr, tail),
    "Adam-OTA, power estimated": lambda params, lr, tail: OverTheAirAdam(params, lr, 1.5),
    "Adam-OTA, wrong power": lambda params, lr, tail: OverTheAirAdam(params, lr, 1.9 if tail < 1.4 else 1.1),
    "FedAvg, clipped": lambda params, lr, tail: torch.optim.SGD(params, lr=lr),
}
"""The last divides what it hears by its largest absolute value where that is above 1: a rival that needs no power."""
RATES = [10.0 ** (power / 2) for power in range(-8, 3)]
TUNING = (100, 101, 102)
CLIENTS, CONCENTRATION, SCALE = 50, 0.1, 0.1


class Problem:
    """Softmax regression on a split of a seed.

    Args:
        images: (n, d), between 0 and 1.
        labels: (n,), from 0 to 9.
        seed: Of the split and of which examples are held out.
        part: ``"val"`` or ``"test"``: the two halves of what is held out.
    """

    def __init__(self, images: Tensor, labels: Tensor, held_out: tuple[Tensor, Tensor], seed: int, part: str) -> None:
        self.images, self.labels = images, labels
        half = len(held_out[1]) // 2
        rows = slice(0, half) if part == "val" else slice(half, None)
        self.test = held_out[0][rows], held_out[1][rows]
        self.clients = dirichlet_split(labels, CLIENTS, CONCENTRATION, seed=seed)
        self.owner = torch.empty(len(labels), dtype=torch.int64)
        for number, indices in enumerate(self.clients):
            self.owner[indices] = number
        self.sizes = torch.tensor([len(indices) for indices in self.clients], dtype=torch.float64)

    def heard(self, model: nn.Module, channel: Channel, round_number: int) -> dict[str, Tensor]:
        """Return what the server hears: the gradient of sum_n h_n / N f_n, with the round's noise on it."""
        gains = torch.tensor([channel.fading_of(n, round_number) for n in range(CLIENTS)], dtype=torch.float64)
        weights = (gains / CLIENTS / self.sizes)[self.owner].to(self.images.dtype)
        loss = (weights * F.cross_entropy(model(self.images), self.labels, reduction="none")).sum()
        names, params = zip(*model.named_parameters(), strict=True)
        clean = dict(zip(names, torch.autograd.grad(loss, params), strict=True))
        noise = channel.noise_like(clean, round_number)
        return {name: clean[name] + noise[name] for name in clean}

    def accuracy(self, model: nn.Module) -> float:
        """Return the accuracy on the held-out part, in percent."""
        with torch.no_grad():
            return 100 * (model(self.test[0]).argmax(1) == self.test[1]).double().mean().item()


def run(
    data: tuple[Tensor, Tensor, tuple[Tensor, Tensor]], method: str, lr: float, tail: float, seed: int, part: str,
    rounds: int,
) -> float:  # fmt: skip
    """Train, and return the accuracy in percent; 0 where the weights are not finite."""
    images, labels, held_out = data
    problem = Problem(images, labels, held_out, seed, part)
    torch.manual_seed(seed)
    model = nn.Linear(images.shape[1], 10)
    optimizer = METHODS[method](list(model.parameters()), lr, tail)
    channel = Channel(alpha=tail, scale=SCALE, seed=seed)
    follower = ResidualTail() if "estimated" in method else None
    for number in range(1, rounds + 1):
        heard = problem.heard(model, channel, number)
        if follower is not None:
            follower.update(heard)
            if follower.count >= 100:
                for group in optimizer.param_groups:
                    group["alpha"] = follower.estimate().usable_alpha
        largest = max(float(tensor.abs().max()) for tensor in heard.values()) if "clipped" in method else 1.0
        for name, param in model.named_parameters():
            param.grad = heard[name].clamp(-1.0, 1.0) if largest > 1 and "clipped" in method else heard[name]
        optimizer.step()
    finite = all(bool(param.isfinite().all()) for param in model.parameters())
    return problem.accuracy(model) if finite else 0.0


def tuned_rate(data: Any, method: str, tail: float, rounds: int) -> tuple[float, bool]:
    """Return the best learning rate on the validation part, and whether it lies at an end of what was tried."""
    grid = list(RATES)
    found: dict[float, float] = {}
    while True:
        for lr in grid:
            if lr not in found:
                found[lr] = mean(run(data, method, lr, tail, seed, "val", rounds) for seed in TUNING)
        best = max(grid, key=lambda lr: found[lr])
        if best not in (grid[0], grid[-1]) or len(grid) > 14:
            return best, best in (grid[0], grid[-1])
        step = math.sqrt(10)
        grid = [grid[0] / step, *grid] if best == grid[0] else [*grid, grid[-1] * step]


def load(name: str) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return images, labels and what is held out of them.

    Args:
        name: ``digits`` or ``mnist:DIR``.
    """
    source = load_data(name)
    (x, y), (u, v) = source.train.tensors, source.held_out.tensors  # type: ignore[attr-defined]
    return x.flatten(1), y, (u.flatten(1), v)


def main() -> None:
    """Tune, run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--tails", type=float, nargs="+", default=[1.1, 1.5, 1.9])
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    data = load(options.data)
    rows, kept, edges = [], {}, []
    for method in METHODS:
        cells = [method]
        for tail in options.tails:
            lr, edge = tuned_rate(data, method, tail, options.rounds)
            found = [run(data, method, lr, tail, seed, "test", options.rounds) for seed in range(options.seeds)]
            kept[f"{method}, tail {tail}"] = {"lr": lr, "edge": edge, "accuracy": found}
            cells.append(f"{spread(found, 1)} ({lr:.2g})")
            edges += [f"{method} at {tail}"] if edge else []
        rows.append(cells)
        print(f"{method}: {time.perf_counter() - begin:.0f} s", flush=True)
    print(f"\n{options.data}, {options.rounds} rounds, {options.seeds} seeds: accuracy in percent (best rate)\n")
    print(table(["server step", *(f"tail index {tail}" for tail in options.tails)], rows))
    print(f"\nbest rate at an end of the grid: {', '.join(edges) or 'nowhere'}")
    print(f"{machine()}, {time.perf_counter() - begin:.0f} s")
    write_json("over-the-air", {"rounds": options.rounds, "data": options.data, "runs": kept})


if __name__ == "__main__":
    main()
