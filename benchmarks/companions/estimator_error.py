"""How far MARS's momentum is from the true gradient, exact and approximate, on a quadratic with additive noise.

    python -m benchmarks.companions.estimator_error [--steps 4000]

f(x) = x^2 / 2 in 1,000 independent coordinates, gradients x + xi with xi ~ N(0, 1) the same at both points of a batch,
beta_1 = 0.95, nothing clipped. Two ways of stepping: x <- x - 0.1 m, of which the error is reported in units of the
noise's variance; and x held still, which leaves the noise alone. The first half of the steps is left out; the standard
error is over ten blocks of coordinates.
"""

from __future__ import annotations

import argparse
import warnings

import torch
from torch import nn

from adadagrad.optimizers import MARS
from benchmarks.companions.kept import table
from benchmarks.machine import machine, write_json

GAMMAS = (0.0, 0.025, 0.2, 1.0)
WIDTH = 1000


def error(gamma: float, mode: str, *, lr: float, steps: int, seed: int = 0) -> tuple[float, float]:
    """Return the mean squared error of m_t around the gradient at x_t, and its standard error.

    Args:
        gamma: Of MARS.
        mode: Of MARS.
        lr: Of the plain step along m; 0 holds x still.
        steps: In all, of which the second half counts.
        seed: Of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    x = nn.Parameter(torch.zeros(WIDTH, dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a large gamma in approximate mode is what is looked at
        optimizer = MARS([x], lr=0.0, gamma=gamma, mode=mode, clip=False, which="all", variant="lion")  # type: ignore[arg-type]
    squares = torch.zeros(WIDTH, dtype=torch.float64)
    moment = torch.zeros(WIDTH, dtype=torch.float64)
    last = torch.zeros(WIDTH, dtype=torch.float64)
    for t in range(steps):
        noise = torch.randn(WIDTH, generator=generator, dtype=torch.float64)

        def closure(noise: torch.Tensor = noise) -> float:
            x.grad = x.detach() + noise
            return 0.0

        optimizer.step(closure)
        state = optimizer.state[x]
        if "previous_param" in state or gamma == 0:
            moment = state["exp_avg"]
        else:  # its closed form: the buffer holds the plain average
            assert x.grad is not None
            weight = 0.95 * (1 - gamma)
            moment, last = weight * last + (1 - weight) * x.grad, state["exp_avg"].clone()
        if t >= steps // 2:
            squares += (moment - x.detach()).square()
        with torch.no_grad():
            x.sub_(moment, alpha=lr)
    blocks = (squares / (steps - steps // 2)).reshape(10, -1).mean(1)
    return float(blocks.mean()), float(blocks.std() / 10**0.5)


def study(steps: int) -> list[dict[str, object]]:
    """Return all errors.

    Args:
        steps: Of each run.
    """
    return [
        {"mode": mode, "gamma": gamma, "lr": lr, "error": value, "spread": spread}
        for mode in ("exact", "approximate")
        for lr in (0.1, 0.0)
        for gamma in GAMMAS
        for value, spread in [error(gamma, mode, lr=lr, steps=steps)]
    ]


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    chosen = parser.parse_args()
    found = study(chosen.steps)
    write_json("companions/estimator_error", {"rows": found})
    rows = []
    for mode in ("exact", "approximate"):
        for lr in (0.1, 0.0):
            some = [r for r in found if r["mode"] == mode and r["lr"] == lr]
            label = f"{mode}, {'steps of 0.1 m' if lr else 'x held still'}"
            rows.append([label, *(f"{r['error']:.4f} ± {r['spread']:.4f}" for r in some)])
    print(table(["", *(f"gamma {gamma:g}" for gamma in GAMMAS)], rows))
    print(machine())


if __name__ == "__main__":
    main()
