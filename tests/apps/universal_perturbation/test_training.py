"""The inverse use: the loss is that of a mixed batch, and training on it makes the model less easily fooled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adadagrad.apps.universal_perturbation import (
    Perturbation,
    RobustnessReport,
    adversarial_training_loss,
    evaluate,
    find_universal_perturbation,
)
from adadagrad.cli.data import load_data
from adadagrad.cli.models import cnn
from adadagrad.core.errors import InvalidArgument
from tests.apps.universal_perturbation.cases import labelled, network


def test_the_loss_is_that_of_a_batch_part_of_which_carries_the_perturbation() -> None:
    model, (images, labels) = network(), labelled(9)
    perturbation = Perturbation(delta=torch.full((1, 5, 5), 0.2), eps=0.3, method="by hand")
    for share, count in ((0.0, 0), (0.5, 4), (0.7, 6), (1.0, 9)):
        rows = [perturbation.apply(images[i : i + 1]) if i < count else images[i : i + 1] for i in range(9)]
        expected = sum(F.cross_entropy(model(row), labels[i : i + 1]) for i, row in enumerate(rows)) / 9
        found = adversarial_training_loss(model, images, labels, perturbation, share=share)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert torch.equal(
        adversarial_training_loss(model, images, labels, perturbation),
        adversarial_training_loss(model, images, labels, perturbation, share=0.5),
    )
    squared = adversarial_training_loss(model, images, labels, perturbation, loss=lambda x, _: x.square().mean())
    assert not torch.equal(squared, adversarial_training_loss(model, images, labels, perturbation))


def test_bad_arguments() -> None:
    model, (images, labels) = network(), labelled()
    perturbation = Perturbation(delta=torch.zeros(1, 5, 5), eps=0.3, method="by hand")
    with pytest.raises(InvalidArgument, match=r"share must be between 0 and 1, got 1\.5"):
        adversarial_training_loss(model, images, labels, perturbation, share=1.5)
    with pytest.raises(InvalidArgument, match=r"images must lie in \[0, 1\]"):
        adversarial_training_loss(model, images * 2, labels, perturbation)
    with pytest.raises(InvalidArgument, match="perturbation must be a Perturbation"):
        adversarial_training_loss(model, images, labels, torch.zeros(1, 5, 5))  # type: ignore[arg-type]


def test_adversarial_training_on_digits_lowers_the_fooling_ratio() -> None:
    """Against a fresh search on each model; both start with the same weights and see each image as often."""
    data, eps = load_data("digits"), 0.15
    images, labels = data.train.tensors  # type: ignore[attr-defined]

    def trained(robust: bool) -> nn.Module:
        torch.manual_seed(2)
        model = cnn((1, 8, 8), 10)
        optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
        generator = torch.Generator().manual_seed(0)
        for _ in range(24):
            for rows in torch.randperm(len(labels), generator=generator).split(64):
                perturbation = Perturbation(delta=torch.zeros(1, 8, 8), eps=eps, method="none")
                if robust:
                    perturbation = find_universal_perturbation(
                        model.eval(), images[rows], eps, method="spgd", epochs=2, step=eps / 2
                    )
                model.train()
                optimizer.zero_grad()
                adversarial_training_loss(model, images[rows], labels[rows], perturbation).backward()
                optimizer.step()
        return model.eval()

    def measure(model: nn.Module) -> RobustnessReport:
        found = find_universal_perturbation(model, images[200:400], eps, epochs=20, large_batch=50, seed=99)
        return evaluate(model, found, data.held_out)  # type: ignore[arg-type]

    plain, robust = measure(trained(False)), measure(trained(True))
    assert plain.clean_accuracy > 0.93
    assert robust.clean_accuracy > 0.93
    assert robust.fooling_ratio < 0.75 * plain.fooling_ratio
    assert robust.adversarial_accuracy > plain.adversarial_accuracy + 0.05
    for report in (plain, robust):
        assert report.random_sign is not None
        assert report.random_sign.fooling_ratio < report.fooling_ratio
