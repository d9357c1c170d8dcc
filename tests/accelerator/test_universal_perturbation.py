"""The search on a CUDA device draws what it draws on the CPU; skips, with a reason, where there is none.

python -m pytest tests/accelerator
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adadagrad.apps.universal_perturbation import evaluate, find_universal_perturbation, transfer_matrix
from tests.apps.universal_perturbation.cases import SETTINGS, labelled, network, some_images

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is at hand")


@pytest.mark.parametrize("images_on", ["cpu", "cuda"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_search_is_that_of_the_cpu(name: str, images_on: str) -> None:
    """In float64 the signs agree wherever a gradient is not 0 but for rounding."""
    settings: dict[str, Any] = SETTINGS[name] | {"epochs": 3}
    on_cpu = find_universal_perturbation(network(), some_images(), 0.2, **settings)
    steps: list[Any] = []
    model = network().cuda()
    found = find_universal_perturbation(model, some_images().to(images_on), 0.2, progress=steps.append, **settings)
    torch.testing.assert_close(found.delta, on_cpu.delta, rtol=0, atol=1e-12)
    assert found.delta.device.type == "cpu"
    assert found.gradient_count == on_cpu.gradient_count
    assert steps[0].delta.device.type == "cuda"
    assert found.apply(some_images().cuda()).device.type == "cuda"


def test_reports_are_those_of_the_cpu_wherever_images_and_labels_are() -> None:
    images, labels = labelled()
    found = find_universal_perturbation(network(), some_images(), 0.2, epochs=3, init=torch.zeros(1, 5, 5).cuda())
    expected = evaluate(network(), found, [(images, labels)])
    model = network().cuda()
    for batch in ((images, labels), (images.cuda(), labels.cuda()), (images.cuda(), labels)):
        assert evaluate(model, found, [batch]) == expected
    matrix = transfer_matrix({"p": found}, {"cpu": network(), "cuda": model}, [(images, labels)])
    assert matrix.reports["p"]["cpu"] == matrix.reports["p"]["cuda"] == expected
