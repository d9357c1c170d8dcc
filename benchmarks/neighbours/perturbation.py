"""One perturbation for all images: SGA beside its baselines at equal cost, transfer, and training against it.

    python -m benchmarks.neighbours.perturbation [--data digits|mnist:DIR] [--seeds 5] [--grey]

For each seed a small convolutional network and a perceptron are trained, crafting images are drawn from the training
images, and every row is found on the same images against the same network. All numbers are of held-out images. SGA
draws each image four times an epoch, so "4x" rows have as many gradients as it has. A second table says what training
on batches half of which carry a perturbation, found anew for each in two steps of SPGD, makes of the numbers; both
networks begin with the same weights and see each image as often. About 3 minutes on one core for eight seeds of digits
and 6 for five of MNIST.

``--grey`` shows images as 0.2 + 0.6 x with eps 0.09 instead of 0.15: the same contrast, and no pixel is ever cut off
at 0 or 1. Where x + delta leaves [0, 1] there is no gradient, and most of MNIST's pixels are black, so this says
whether that cutting decides between the methods. It does not. The class that is predicted most often with a
perturbation stands in results/neighbours/ for every row and seed.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from adadagrad.apps.universal_perturbation import (
    Perturbation,
    RobustnessReport,
    evaluate,
    find_universal_perturbation,
    transfer_matrix,
)
from adadagrad.cli.data import load_data
from benchmarks.companions.kept import spread, table
from benchmarks.machine import machine, write_json
from benchmarks.neighbours.perturbed_networks import GREY, SETTINGS, Setting, networks

ROWS: dict[str, dict[str, Any]] = {
    "random signs": {"method": "random"},
    "SPGD, batch 10": {"method": "spgd", "large_batch": 10},
    "SPGD, batch 100": {"method": "spgd", "large_batch": 100},
    "SPGD, batch 10, 4x": {"method": "spgd", "large_batch": 10, "times": 4},
    "SPGD, batch 100, 4x": {"method": "spgd", "large_batch": 100, "times": 4},
    "aggregation without the walk": {"method": "aggregation", "large_batch": 100},
    "SGA": {"method": "sga", "large_batch": 100},
}
"""Arguments of the search by what the table says; ``times`` multiplies its epochs."""


def craft(model: nn.Module, images: Tensor, setting: Setting, seed: int, row: dict[str, Any]) -> Perturbation:
    """Find the perturbation of a row.

    Args:
        model: The network under test.
        images: To find it on.
        setting: Epochs.
        seed: Of the draws.
        row: Of `ROWS`.
    """
    epochs = setting.search * row.get("times", 1)
    arguments = {key: value for key, value in row.items() if key != "times"}
    return find_universal_perturbation(model, images, setting.eps, epochs=epochs, seed=seed, **arguments)


def study(spec: str, seeds: int, setting: Setting) -> list[dict[str, Any]]:
    """Train, search and evaluate for every seed.

    Args:
        spec: Data, as the command line names them.
        seeds: How many.
        setting: What belongs to the data.

    Returns:
        One record for each evaluation.
    """
    source = load_data(spec)
    data, held_out = setting.shown(source.train), setting.shown(source.held_out)
    images, labels = (tensor[: setting.train] for tensor in data.tensors)
    records: list[dict[str, Any]] = []
    for seed in range(seeds):
        made = networks(TensorDataset(images, labels), setting, seed)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        for n in setting.crafting:
            found = {name: craft(made["cnn"], images[order[:n]], setting, seed, row) for name, row in ROWS.items()}
            matrix = transfer_matrix(found, {name: made[name] for name in ("cnn", "mlp")}, held_out, seed=seed)
            for name, row in matrix.reports.items():
                records += [record(seed, n, name, model, report) for model, report in row.items()]
        against = craft(made["robust"], images[order[: setting.crafting[-1]]], setting, seed, ROWS["SGA"])
        report = evaluate(made["robust"], against, held_out, seed=seed)
        records.append(record(seed, setting.crafting[-1], "SGA", "robust", report))
    return records


def record(seed: int, n: int, row: str, model: str, report: RobustnessReport) -> dict[str, Any]:
    """Return plain values.

    Args:
        seed: The seed.
        n: Crafting images.
        row: Of the table.
        model: Whose numbers they are.
        report: The numbers.
    """
    return {"seed": seed, "n": n, "row": row, "model": model, **asdict(report)}


def rows_of(records: list[dict[str, Any]], n: int) -> list[list[str]]:
    """Return the first table's rows for one number of crafting images, in per cent.

    Args:
        records: Of `study`.
        n: Crafting images.
    """

    def ratios(row: str, model: str) -> list[float]:
        chosen = [r for r in records if (r["n"], r["row"], r["model"]) == (n, row, model)]
        return [100 * r["fooling_ratio"] for r in chosen]

    lines = []
    for row in ROWS:
        first = next(r for r in records if r["n"] == n and r["row"] == row)
        accuracy = [
            100 * r["adversarial_accuracy"] for r in records if (r["n"], r["row"], r["model"]) == (n, row, "cnn")
        ]
        differences = [a - b for a, b in zip(ratios("SGA", "cnn"), ratios(row, "cnn"), strict=True)]
        wins = sum(d > 0 for d in differences)
        paired = "" if row == "SGA" else f"{spread(list(differences), 1)}, {wins} of {len(differences)}"
        cells = [row, f"{first['gradient_count']:,}", spread(list(ratios(row, "cnn")), 1), paired]
        lines.append([*cells, spread(list(accuracy), 1), spread(list(ratios(row, "mlp")), 1)])
    return lines


def before_and_after(records: list[dict[str, Any]], n: int) -> list[list[str]]:
    """Return the second table's rows, in per cent.

    Args:
        records: Of `study`.
        n: Crafting images.
    """
    lines = []
    for model, label in (("cnn", "plain"), ("robust", "half of each batch perturbed")):
        chosen = [r for r in records if (r["n"], r["row"], r["model"]) == (n, "SGA", model)]
        numbers = [
            [100 * r["clean_accuracy"] for r in chosen],
            [100 * r["fooling_ratio"] for r in chosen],
            [100 * r["adversarial_accuracy"] for r in chosen],
            [100 * r["random_sign"]["fooling_ratio"] for r in chosen],
        ]
        lines.append([label, *(spread(list(values), 1) for values in numbers)])
    return lines


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits or mnist:DIR")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--grey", action="store_true", help="images from 0.2 to 0.8")
    chosen = parser.parse_args()
    if chosen.data.partition(":")[0] not in SETTINGS:
        parser.error(f"--data must be digits or mnist:DIR, got {chosen.data}")
    torch.set_num_threads(1)
    start = time.process_time()
    name = chosen.data.partition(":")[0]
    setting = replace(SETTINGS[name], contrast=GREY if chosen.grey else 1.0)
    records = study(chosen.data, chosen.seeds, setting)
    name += "-grey" if chosen.grey else ""
    write_json(f"neighbours/perturbation-{name}", {"records": records, "setting": asdict(setting)})
    heads = [
        "row",
        "gradients",
        "fooling ratio, %",
        "SGA minus row, higher in",
        "accuracy under it, %",
        "on the MLP, %",
    ]
    for n in setting.crafting:
        print(
            f"\n{name}, eps {setting.eps:.3g}, {n} crafting images, {chosen.seeds} seeds, mean ± standard deviation\n"
        )
        print(table(heads, rows_of(records, n)))
    clean = {m: [100 * r["clean_accuracy"] for r in records if r["model"] == m] for m in ("cnn", "mlp")}
    print(f"\nclean accuracy: cnn {mean(clean['cnn']):.1f} %, mlp {mean(clean['mlp']):.1f} %\n")
    heads = ["training", "clean accuracy, %", "fooling ratio of SGA, %", "accuracy under it, %", "random signs, %"]
    print(table(heads, before_and_after(records, setting.crafting[-1])))
    print(f"\n{machine()}, {time.process_time() - start:.0f} s of processor time")


if __name__ == "__main__":
    main()
