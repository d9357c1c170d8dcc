"""`save_state` holds how far the engine is, once, and `load_state` continues there bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adadagrad.core.errors import InvalidArgument, StepError
from tests.integrations.accelerators import make_accelerator, make_engine
from tests.integrations.hosts import mean_loss, train, weights


class Dropping(nn.Module):
    """A model that draws random numbers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner, self.dropout = model, nn.Dropout(0.3)

    def forward(self, x: Any) -> Any:
        return self.inner(self.dropout(x))


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_resumed_run_is_the_run_that_was_not_left(tmp_path: Path, precision: str, steps: int) -> None:
    whole = make_engine(make_accelerator(mixed_precision=precision))
    expected = train(whole, whole.model)
    accelerator = make_accelerator(mixed_precision=precision)
    first = make_engine(accelerator)
    begun = train(first, first.model, steps) if steps else []
    accelerator.save_state(str(tmp_path))
    accelerator = make_accelerator(mixed_precision=precision)
    second = make_engine(accelerator, model_seed=7)
    torch.manual_seed(99)
    accelerator.load_state(str(tmp_path))
    assert second.steps == steps
    assert begun + train(second, second.model) == expected
    assert torch.equal(weights(second), weights(whole))


def test_random_numbers_go_on_too(tmp_path: Path) -> None:
    def run(steps: int | None) -> Any:
        torch.manual_seed(3)
        engine = make_engine(make_accelerator())
        return engine, train(engine, Dropping(engine.model), steps or 10**9)

    whole, expected = run(None)
    accelerator = make_accelerator()
    torch.manual_seed(3)
    first = make_engine(accelerator)
    begun = train(first, Dropping(first.model), 3)
    accelerator.save_state(str(tmp_path))
    accelerator = make_accelerator()
    second = make_engine(accelerator)
    accelerator.load_state(str(tmp_path))
    assert begun + train(second, Dropping(second.model)) == expected
    assert torch.equal(weights(second), weights(whole))


def test_the_model_is_saved_once(tmp_path: Path) -> None:
    accelerator = make_accelerator()
    engine = make_engine(accelerator)
    train(engine, engine.model, 2)
    accelerator.save_state(str(tmp_path))
    saved = torch.load(tmp_path / "custom_checkpoint_0.pkl", weights_only=True)
    assert saved["samples_seen"] == engine.samples_seen
    assert not {"model", "optimizer"} & set(saved)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("custom_checkpoint_0.pkl", "model.safetensors", "optimizer.bin", "random_states_0.pkl")
    }


def test_a_step_in_progress_is_not_saved(tmp_path: Path) -> None:
    accelerator = make_accelerator()
    engine = make_engine(accelerator)
    for step in engine:
        with pytest.raises(StepError, match="a step is in progress"):
            accelerator.save_state(str(tmp_path))
        step.run(mean_loss(engine.model))
        step.update()
        break


def test_another_runs_state_is_refused(tmp_path: Path) -> None:
    accelerator = make_accelerator()
    make_engine(accelerator, model_seed=0)
    accelerator.save_state(str(tmp_path))
    accelerator = make_accelerator()
    make_engine(
        accelerator, model_seed=0, data=torch.utils.data.TensorDataset(torch.ones(50, 10), torch.ones(50).long())
    )
    with pytest.raises(InvalidArgument, match="state"):
        accelerator.load_state(str(tmp_path))
