"""Without a tracker's package the error names the extra, and the others work."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from adadagrad.core.errors import MissingExtra
from adadagrad.integrations.trackers import MLflow, TensorBoard, Trackio, WandB


@pytest.mark.parametrize(
    ("module", "package", "make"),
    [
        ("torch.utils.tensorboard.writer", "tensorboard", lambda: TensorBoard("here")),
        ("wandb", "wandb", lambda: WandB("project")),
        ("mlflow", "mlflow", lambda: MLflow("experiment")),
        ("trackio", "trackio", lambda: Trackio("project")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_error_names_the_extra(
    module: str, package: str, make: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"^{package} is not installed: pip install 'adadagrad\[{package}\]'$"):
        make()
