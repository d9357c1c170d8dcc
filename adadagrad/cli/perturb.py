"""``adadagrad perturb``: how one small perturbation, the same for all inputs, changes a model's predictions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from adadagrad.apps.universal_perturbation import (
    CraftingStep,
    Perturbation,
    RobustnessReport,
    evaluate,
    find_universal_perturbation,
    save_perturbation,
)
from adadagrad.cli.arguments import read_flags
from adadagrad.cli.data import DataSource, load_data
from adadagrad.cli.directory import new_directory, remove_if_empty
from adadagrad.cli.evaluation import EVALUATION_BATCH_SIZE
from adadagrad.cli.fit import check_data, check_fit
from adadagrad.cli.names import make_model
from adadagrad.cli.outcome import check_seed, choices, in_flags_of, refuse_unread, write_outcome
from adadagrad.cli.perturb_sheet import perturb_sheet
from adadagrad.cli.progress import progress_display
from adadagrad.cli.weights import load_weights
from adadagrad.core.checks import check_integer
from adadagrad.core.errors import InvalidArgument

PERTURBATION_NAME = "perturbation.pt"


@dataclass(frozen=True, kw_only=True)
class PerturbProblem:
    """The model under test: your own, or one that you are authorised to test.

    Args:
        data: digits, mnist:DIR, or package.module:function that returns (training data, validation data); images must
            lie in [0, 1]. The perturbation is found on training images and evaluated on the others.
        model: logistic, mlp, cnn, or package.module:function that returns a module.
        checkpoint: Its weights: a checkpoint of train or engine.save, or a state dict written by torch.save.
        transfer: Other models to try the perturbation on, each as model:checkpoint.
    """

    data: str = "digits"
    model: str = "cnn"
    checkpoint: Path | None = None
    transfer: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How the perturbation is found.

    Args:
        method: sga (stochastic gradient aggregation), spgd (one gradient a batch), aggregation (sga without its inner
            walk) or random (signs, nothing is searched).
        eps: Largest change of a pixel, in image units.
        images: Training images to find it on.
        epochs: Passes over them.
        k: Inner gradients a pass, in multiples of the images [sga, aggregation].
        small_batch: Images in an inner gradient [sga, aggregation].
        large_batch: Images in an outer step.
        loss: clamped_ce or neg_logit.
        beta: Where the cross-entropy is cut off [clamped_ce].
        momentum: Of the outer step; 0 for none.
        target: Drive predictions to this class, instead of away from what they are.
    """

    method: str = "sga"
    eps: float = 0.15
    images: int = 200
    epochs: int = 20
    k: int = 4
    small_batch: int = 10
    large_batch: int = 250
    loss: str = "clamped_ce"
    beta: float = 9.0
    momentum: float = 0.9
    target: int | None = None


@dataclass(frozen=True, kw_only=True)
class PerturbRun:
    """Seed and place.

    Args:
        seed: Of the images that are chosen, of the search, and of the random signs beside it.
        out: Directory to make; without it a numbered one under runs/.
    """

    seed: int = 0
    out: Path | None = None


@dataclass(frozen=True, kw_only=True)
class PerturbCommand:
    """Measure how robust a model is to the worst small perturbation, the same for all inputs, that a search finds.

    Reports clean accuracy, accuracy under the perturbation, the share of predictions that change, and the same for
    random signs of the same size. What is found is a lower bound of the vulnerability, never a certificate.
    """

    problem: PerturbProblem = field(default_factory=PerturbProblem)
    search: SearchOptions = field(default_factory=SearchOptions)
    run: PerturbRun = field(default_factory=PerturbRun)


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Args:
        arguments: What follows ``perturb``.

    Returns:
        The exit status.

    Raises:
        InvalidArgument: No weights are named, or an argument is out of its range.
    """
    command = read_flags("perturb", PerturbCommand(), arguments)
    problem = command.problem
    if problem.checkpoint is None:
        raise InvalidArgument(
            "--checkpoint must be given: the weights of the model under test, such as those of adadagrad train --data "
            f"{problem.data} --model {problem.model}, in runs/train-001/checkpoint.pt"
        )
    data = load_data(problem.data)
    check_data(data)
    with in_flags_of(command):
        check_integer(1, images=command.search.images)
        check_seed(command.run.seed)
    _refuse_unused(command, arguments)
    model = _loaded(problem.model, problem.checkpoint, data)
    others = {name: _loaded(name.rpartition(":")[0], _path(name), data) for name in problem.transfer}
    directory = new_directory(command.run.out, "perturb")
    try:
        with in_flags_of(command):
            perturbation = find(command, model, data)
            report = evaluate(model, perturbation, _loader(data.held_out), seed=command.run.seed)
            transfer = {
                name: evaluate(other, perturbation, _loader(data.held_out), seed=command.run.seed)
                for name, other in others.items()
            }
        save_perturbation(directory / PERTURBATION_NAME, perturbation)
        print(report.summary())
        for name, other in transfer.items():
            print(f"on {name}: {other.summary()}")
        rows = [_row(problem.model, report), *(_row(name, other) for name, other in transfer.items())]
        shown = [torch.as_tensor(data.held_out[index][0]) for index in range(min(200, len(data.held_out)))]  # type: ignore[arg-type]
        sheet = perturb_sheet(model, perturbation, report, transfer, shown)
        write_outcome(directory, command, rows, replace(sheet, settings=choices(command)))
    finally:
        remove_if_empty(directory)
    return 0


def find(command: PerturbCommand, model: nn.Module, data: DataSource) -> Perturbation:
    """Search, with a line of progress.

    Args:
        command: What the user chose.
        model: Under test.
        data: Whose training images the search sees.

    Returns:
        What was found.
    """
    search, seed, size = command.search, command.run.seed, len(data.train)  # type: ignore[arg-type]
    chosen = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[: search.images]
    progress = progress_display("perturb", 100)

    def show(step: CraftingStep) -> None:
        parts = [f"step {step.step}/{step.steps}", f"{step.gradient_count:,} gradients", f"loss {step.loss:.3f}"]
        progress.show(100 * step.step / step.steps, parts)

    with closing(progress):
        return find_universal_perturbation(
            model,
            Subset(data.train, chosen.tolist()),
            search.eps,
            method=search.method,
            k=search.k,
            small_batch=search.small_batch,
            large_batch=search.large_batch,
            epochs=search.epochs,
            loss=search.loss,
            beta=search.beta,
            momentum=search.momentum,
            target=search.target,
            seed=seed,
            progress=show,
        )


def _loaded(name: str, checkpoint: Path, data: DataSource) -> nn.Module:
    model = make_model(name, data)
    load_weights(model, checkpoint)
    check_fit(model, name, data, trains=False)
    return model.eval()


def _refuse_unused(command: PerturbCommand, arguments: Sequence[str]) -> None:
    """Refuse flags that change nothing beside the others."""
    search = command.search
    inner = (search.method in ("sga", "aggregation"), "--method sga or aggregation")
    searched = (search.method != "random", "another --method")
    cut = (
        search.method != "random" and search.loss == "clamped_ce" and search.target is None,
        "--loss clamped_ce without --target",
    )
    names = ("epochs", "images", "large_batch", "loss", "momentum", "target")
    readers = {"k": inner, "small_batch": inner, "beta": cut, **dict.fromkeys(names, searched)}
    refuse_unread(arguments, readers)


def _path(name: str) -> Path:
    """The checkpoint of another model: what follows the last colon."""
    _, colon, path = name.rpartition(":")
    if not colon or not path:
        raise InvalidArgument(f"--transfer {name}: expected model:checkpoint, as in mlp:runs/train-002/checkpoint.pt")
    return Path(path)


def _loader(dataset: Any) -> DataLoader[Any]:
    return DataLoader(dataset, EVALUATION_BATCH_SIZE)


def _row(name: str, report: RobustnessReport) -> dict[str, Any]:
    return {"model": name, **asdict(report)}
