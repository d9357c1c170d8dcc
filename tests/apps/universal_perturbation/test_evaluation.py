"""Evaluation against a count by hand, the same for every batch size, and the transfer matrix."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from adadagrad.apps.universal_perturbation import (
    Perturbation,
    RobustnessReport,
    evaluate,
    find_universal_perturbation,
    transfer_matrix,
)
from adadagrad.core.errors import EmptyDataset, InvalidArgument
from tests.apps.universal_perturbation.cases import CLASSES, labelled, network, some_images

EPS = 0.3


def crafted(seed: int = 0, **settings: Any) -> Perturbation:
    return find_universal_perturbation(
        network(seed), some_images(), EPS, **{"epochs": 6, "large_batch": 12, "small_batch": 4} | settings
    )


def zero(eps: float = EPS) -> Perturbation:
    return Perturbation(delta=torch.zeros(1, 5, 5), eps=eps, method="none")


def numbers(model: nn.Module, delta: Tensor, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """The definitions, one image at a time."""
    rows = []
    for image, label in zip(images, labels.tolist(), strict=True):
        before = int(model(image[None]).argmax())
        after = int(model(torch.clip(image + delta, 0, 1)[None]).argmax())
        rows.append((label, before, after))
    after_all = [after for _, _, after in rows]
    dominant = max(range(CLASSES), key=after_all.count)  # the first of several
    per_class = []
    for label in range(CLASSES):
        mine = [row for row in rows if row[0] == label]
        per_class.append((
            label,
            len(mine),
            sum(b == label for _, b, _ in mine) / len(mine),
            sum(a == label for _, _, a in mine) / len(mine),
            sum(a != b for _, b, a in mine) / len(mine),
        ))
    right = sum(a == label for label, _, a in rows) / len(rows)
    return {
        "n_samples": len(rows),
        "clean_accuracy": sum(b == label for label, b, _ in rows) / len(rows),
        "adversarial_accuracy": right,
        "fooling_ratio": sum(a != b for _, b, a in rows) / len(rows),
        "fooling_rate": 1 - right,
        "per_class": per_class,
        "dominant_class": dominant,
        "dominant_share": after_all.count(dominant) / len(rows),
    }


def as_numbers(report: RobustnessReport) -> dict[str, Any]:
    names = numbers(network(), torch.zeros(1, 5, 5), *labelled()).keys()
    found = {name: getattr(report, name) for name in names}
    return found | {"per_class": [dataclasses.astuple(row) for row in report.per_class]}


def test_equals_a_count_image_by_image() -> None:
    model, (images, labels), perturbation = network(), labelled(), crafted()
    report = evaluate(model, perturbation, [(images, labels)])
    assert as_numbers(report) == numbers(model, perturbation.delta, images, labels)
    assert report.eps == EPS
    assert report.linf_norm == perturbation.linf_norm <= EPS
    assert report.gradient_count == perturbation.gradient_count == 6 * 2 * 48
    assert report.method == "sga"
    assert (report.target, report.target_rate) == (None, None)
    assert report.clean_accuracy == pytest.approx(26 / 40)
    assert report.fooling_ratio != report.fooling_rate


def test_random_signs_stand_beside_it_in_the_same_numbers() -> None:
    model, (images, labels) = network(), labelled()
    report = evaluate(model, crafted(), [(images, labels)], seed=4)
    baseline = report.random_sign
    assert baseline is not None
    drawn = find_universal_perturbation(model, images, EPS, method="random", seed=4)
    assert as_numbers(baseline) == numbers(model, drawn.delta.double(), images, labels)
    assert (baseline.method, baseline.eps, baseline.gradient_count, baseline.random_sign) == ("random", EPS, 0, None)
    assert baseline.linf_norm == pytest.approx(EPS, rel=1e-6)
    others = {evaluate(model, crafted(), [(images, labels)], seed=seed).random_sign for seed in range(4)}
    assert len(others) > 1


def test_nothing_is_fooled_by_no_perturbation() -> None:
    report = evaluate(network(), zero(), [labelled()])
    assert report.fooling_ratio == 0.0
    assert report.fooling_rate == 1 - report.clean_accuracy
    assert report.adversarial_accuracy == report.clean_accuracy
    assert all(row.fooling_ratio == 0 for row in report.per_class)
    at_zero = find_universal_perturbation(network(), some_images(), 0.0)
    report = evaluate(network(), at_zero, [labelled()])
    assert report.fooling_ratio == 0.0
    assert report.random_sign is not None
    assert report.random_sign.fooling_ratio == 0.0


@pytest.mark.parametrize("batch", [1, 7, 13, 39, 40, 1000])
def test_every_batch_size_gives_the_same_report(batch: int) -> None:
    data, perturbation = TensorDataset(*labelled()), crafted(target=1)
    expected = evaluate(network(), perturbation, data)
    assert evaluate(network(), perturbation, DataLoader(data, batch_size=batch)) == expected
    assert evaluate(network(), perturbation, DataLoader(data, batch_size=batch, shuffle=True)) == expected
    assert evaluate(network(), perturbation, iter(DataLoader(data, batch_size=batch))) == expected


def test_target_rate_is_the_share_of_the_target() -> None:
    model, (images, labels) = network(), labelled()
    for target in range(CLASSES):
        perturbation = crafted(target=target)
        report = evaluate(model, perturbation, [(images, labels)])
        share = float((model(perturbation.apply(images)).argmax(1) == target).double().mean())
        assert report.target_rate == share
        assert report.target == target
        assert report.random_sign is not None
        assert report.random_sign.target_rate is not None
        assert report.random_sign.target_rate < share


def test_classes_that_do_not_occur_have_no_row() -> None:
    images, labels = labelled()
    report = evaluate(network(), crafted(), [(images[labels == 2], labels[labels == 2])])
    assert [row.label for row in report.per_class] == [2]
    assert report.per_class[0].count == report.n_samples


def test_reports_are_plain_numbers_with_a_summary_that_names_them_all() -> None:
    report = evaluate(network(), crafted(target=1), [labelled()])
    assert json.loads(json.dumps(dataclasses.asdict(report)))["random_sign"]["method"] == "random"
    first, second = report.summary().splitlines()
    assert first.startswith(f"sga at eps 0.3: accuracy {report.clean_accuracy:.2%} clean, ")
    assert f"fooling ratio {report.fooling_ratio:.2%}; " in first
    assert f"target 1 {report.target_rate:.2%} (40 images, 576 gradients)" in first
    assert second.startswith("random at eps 0.3: accuracy ")


def test_transfer_matrix_is_an_evaluation_of_every_pair() -> None:
    models = {"first": network(0), "second": network(3), "single": network(0, torch.float32)}
    found = {"on first": crafted(0), "on second": crafted(3, target=2), "small": crafted(0, method="spgd")}
    loader = DataLoader(TensorDataset(*labelled()), batch_size=9)
    matrix = transfer_matrix(found, models, loader, seed=2)
    for name, perturbation in found.items():
        for model, module in models.items():
            report = evaluate(module, perturbation, loader, seed=2)
            assert matrix.reports[name][model] == report
            assert matrix.fooling_ratio[name][model] == report.fooling_ratio
            assert matrix.adversarial_accuracy[name][model] == report.adversarial_accuracy
            assert report.random_sign is not None
            assert matrix.random_sign[name][model] == report.random_sign.fooling_ratio
            assert matrix.clean_accuracy[model] == report.clean_accuracy
    assert list(matrix.fooling_ratio) == list(found)
    assert list(matrix.fooling_ratio["small"]) == list(models)
    table = matrix.table().splitlines()
    assert table[0] == "| fooling ratio (random signs), % | first | second | single |"
    ratio, random = matrix.fooling_ratio["on first"]["second"], matrix.random_sign["on first"]["second"]
    assert table[2].split(" | ")[2] == f"{100 * ratio:.1f} ({100 * random:.1f})"
    assert table[-1].startswith("| clean accuracy, % | ")
    assert len(table) == 6


def test_different_radii_have_random_signs_of_their_own() -> None:
    found = {"wide": zero(0.5), "narrow": zero(0.01)}
    matrix = transfer_matrix(found, {"model": network()}, [labelled()])
    assert matrix.random_sign["wide"]["model"] > matrix.random_sign["narrow"]["model"]


IMAGES, LABELS = labelled()
BAD_LOADERS: dict[str, tuple[Any, type[Exception], str]] = {
    "empty": ([], EmptyDataset, "loader yields no images"),
    "a pair": ((IMAGES, LABELS), InvalidArgument, "loader must yield batches .* got a tuple: .* a list of batches"),
    "a tensor": (IMAGES, InvalidArgument, "loader must yield batches .* got a Tensor"),
    "a number": (3, InvalidArgument, "loader must yield batches .* got a int"),
    "no labels": (DataLoader(TensorDataset(IMAGES)), InvalidArgument, "got a list in it"),  # of one tensor
    "images alone": ([IMAGES], InvalidArgument, "got a Tensor in it"),
    "outside": (
        [(2 * IMAGES - 1, LABELS)],
        InvalidArgument,
        r"images of loader must lie in \[0, 1\], got values from -",
    ),
    "other shape": (
        [(IMAGES[..., :4], LABELS)],
        InvalidArgument,
        r"shape \(n, \*\(1, 5, 5\)\) here, got \(40, 1, 5, 4\)",
    ),
    "soft labels": ([(IMAGES, torch.rand(40, 3))], InvalidArgument, r"class numbers of shape \(40,\), got \(40, 3\)"),
    "real labels": ([(IMAGES, LABELS.double())], InvalidArgument, "class numbers .* got .*float64"),
    "few labels": ([(IMAGES, LABELS[:3])], InvalidArgument, r"class numbers of shape \(40,\), got \(3,\)"),
    "label list": ([(IMAGES, LABELS.tolist())], InvalidArgument, "class numbers .* got a list"),
    "high label": ([(IMAGES, LABELS + 1)], InvalidArgument, "must be >= 0 and < 3, .* got 1 to 3"),
    "low label": ([(IMAGES, LABELS - 1)], InvalidArgument, "must be >= 0 and < 3, .* got -1 to 1"),
}


@pytest.mark.parametrize("name", BAD_LOADERS)
def test_bad_loaders_are_refused(name: str) -> None:
    loader, error, message = BAD_LOADERS[name]
    with pytest.raises(error, match=message):
        evaluate(network(), crafted(), loader)


def test_bad_models_and_perturbations_are_refused_before_any_batch() -> None:
    def never() -> Any:
        raise AssertionError("read")
        yield

    with pytest.raises(InvalidArgument, match="model must be in evaluation mode"):
        evaluate(network().train(), crafted(), never())
    with pytest.raises(
        InvalidArgument, match=r"perturbation must be a Perturbation, got a Tensor: .*Perturbation\(delta="
    ):
        evaluate(network(), torch.zeros(1, 5, 5), never())  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="seed must be an integer"):
        evaluate(network(), crafted(), never(), seed=0.5)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=r"models\['b'\] must be in evaluation mode"):
        transfer_matrix({"p": crafted()}, {"a": network(), "b": network().train()}, never())
    with pytest.raises(InvalidArgument, match=r"perturbations\['p'\] must be a Perturbation"):
        transfer_matrix({"p": torch.zeros(1)}, {"a": network()}, never())  # type: ignore[dict-item]
    with pytest.raises(InvalidArgument, match="must not be empty, got 0 and 1"):
        transfer_matrix({}, {"a": network()}, never())
    with pytest.raises(InvalidArgument, match="loader must be readable once for each model, got an iterator"):
        transfer_matrix({"p": crafted()}, {"a": network(), "b": network()}, never())
    targeted = Perturbation(delta=torch.zeros(1, 5, 5), eps=0.1, method="own", target=7)
    with pytest.raises(InvalidArgument, match=r"target must be < 3, .* got 7"):
        evaluate(network(), targeted, [labelled()])
