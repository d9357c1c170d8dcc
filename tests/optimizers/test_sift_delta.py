"""What fine-tuning has changed, as a file: there and back bit for bit, and nothing on the wrong model."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adadagrad.core.errors import InvalidArgument, InvalidData, MissingExtra
from adadagrad.optimizers import SIFT
from adadagrad.optimizers.sift_delta import apply_delta, save_delta
from adadagrad.optimizers.sift_groups import sift_groups
from tests.optimizers.test_sift import make_model, train, values

pytest.importorskip("safetensors")


def tuned(path: Path, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, torch.Tensor], int]:
    model = make_model(dtype)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    train(SIFT(model.parameters(), lr=0.01, rate=0.05), model, range(5))
    return model, start, save_delta(path, model, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_there_and_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "delta.safetensors"
    model, start, count = tuned(path, dtype)
    expected = sum(min(int(0.05 * p.numel()) + 1, p.numel()) for p in model.parameters())
    assert count == expected or dtype == torch.bfloat16  # in which a step may be too small to show
    other = make_model(dtype)
    assert apply_delta(path, other) == count
    assert all(torch.equal(a, b) for a, b in zip(values(other), values(model), strict=True))
    assert apply_delta(path, other, revert=True) == count
    assert all(torch.equal(value, start[name]) for name, value in other.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["delta.safetensors"]


def test_the_file_is_small(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 3))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = SIFT(model.parameters(), lr=0.01, rate=0.01)
    for _ in range(3):
        model(torch.randn(8, 400)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    count = save_delta(tmp_path / "delta", model, start)
    assert count == sum(int(0.01 * p.numel()) + 1 for p in model.parameters())
    assert (tmp_path / "delta").stat().st_size < 12 * count + 2000


def test_nan_and_signs_of_zero_are_carried(tmp_path: Path) -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[0.0, 1.0], [float("nan"), 2.0]])
    start = {"weight": model.weight.detach().clone()}
    model.weight.data = torch.tensor([[-0.0, 1.0], [float("nan"), float("nan")]])
    assert save_delta(tmp_path / "delta", model, start) == 2
    other = nn.Linear(2, 2, bias=False)
    other.load_state_dict(start)
    apply_delta(tmp_path / "delta", other)
    assert torch.equal(torch.signbit(other.weight[0]), torch.tensor([True, False]))
    assert other.weight.isnan().tolist() == [[False, False], [True, True]]


def test_another_model_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "delta"
    model, start, _ = tuned(path)
    other = make_model(torch.float32)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.5)
    before = values(other)
    with pytest.raises(InvalidArgument, match=r"was made from other values of 0.bias: load the model"):
        apply_delta(path, other)
    assert all(torch.equal(a, b) for a, b in zip(values(other), before, strict=True))
    with pytest.raises(InvalidArgument, match="at its start plus this file"):
        apply_delta(path, make_model(torch.float32), revert=True)
    with pytest.raises(InvalidArgument, match="which this model does not have"):
        apply_delta(path, nn.Linear(6, 8))
    with pytest.raises(InvalidArgument, match="or has in another form"):
        apply_delta(path, make_model(torch.float64))
    with pytest.raises(InvalidArgument, match=r"start must hold the same tensors as the model, and 4.bias"):
        save_delta(path, model, {name: value for name, value in start.items() if name != "4.bias"})
    with pytest.raises(InvalidArgument, match=r"start holds 0.weight as torch.float64"):
        save_delta(path, model, make_model(torch.float64).state_dict())
    turned = make_model(torch.float32)
    turned[2].weight.data = turned[2].weight.data.view(4, 16)  # as many entries, in another form
    with pytest.raises(InvalidArgument, match=r"changes 2.weight, which this model does not have, or has in another"):
        apply_delta(path, turned)


def test_a_start_that_was_not_copied_is_refused(tmp_path: Path) -> None:
    """It has changed with the model, and the file would be empty."""
    model = make_model()
    start = model.state_dict()
    train(SIFT(model.parameters(), lr=0.01), model, range(3))
    with pytest.raises(InvalidArgument, match=r"start shares the memory of 0.weight with the model: copy it before"):
        save_delta(tmp_path / "delta", model, start)
    assert not (tmp_path / "delta").exists()


def test_tensors_of_which_all_has_changed_are_written_without_places(tmp_path: Path) -> None:
    from safetensors import safe_open

    model = make_model(torch.float32)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    groups = sift_groups(model, include=["0.weight"], dense=["4.*"])
    train(SIFT(groups, lr=0.01, rate=0.05), model, range(4))
    assert save_delta(tmp_path / "delta", model, start) == 3 + 24 + 3
    with safe_open(tmp_path / "delta", framework="pt") as file:
        assert sorted(name for name in list(file.keys()) if "places" in name) == ["0.weight/places"]
    other = make_model(torch.float32)
    assert apply_delta(tmp_path / "delta", other) == 30
    assert all(torch.equal(a, b) for a, b in zip(values(other), values(model), strict=True))
    apply_delta(tmp_path / "delta", other, revert=True)
    assert all(torch.equal(value, start[name]) for name, value in other.state_dict().items())


def test_a_model_that_has_not_changed_and_one_that_keeps_more_than_tensors(tmp_path: Path) -> None:
    class Noted(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

        def set_extra_state(self, state: dict[str, int]) -> None:
            pass

    model = Noted(2, 2)
    start = copy.deepcopy(model.state_dict())
    assert save_delta(tmp_path / "delta", model, start) == apply_delta(tmp_path / "delta", model) == 0
    model.weight.data[0, 0] += 1
    assert save_delta(tmp_path / "delta", model, start) == 1
    other = Noted(2, 2)
    other.load_state_dict(start)
    assert apply_delta(tmp_path / "delta", other) == 1
    assert torch.equal(other.weight, model.weight)


EIGHT, ONE, SHAPES = torch.ones(8), torch.ones(1), '{"0.bias": [8]}'


@pytest.mark.parametrize(
    ("parts", "shapes", "message"),
    [
        ({"places": torch.ones(2, dtype=torch.int32)}, SHAPES, "holds 0.bias in part only"),
        ({}, SHAPES, "holds 0.bias in part only"),
        ({"values": EIGHT, "before": EIGHT}, "{}", "holds 0.bias in part only"),
        ({"values": EIGHT, "before": EIGHT}, "[1]", "does not say which shapes"),
        ({"values": EIGHT, "before": EIGHT}, '{"0.bias": "x"}', "does not say which shapes"),
        ({"values": ONE, "before": ONE}, SHAPES, "do not go together"),
        ({"values": EIGHT, "before": EIGHT.double()}, SHAPES, "do not go together"),
        ({"places": [-1], "values": ONE, "before": ONE}, SHAPES, "do not go together"),
        ({"places": [8], "values": ONE, "before": ONE}, SHAPES, "do not go together"),
        ({"places": [0.5], "values": ONE, "before": ONE}, SHAPES, "do not go together"),
        ({"places": [1, 2], "values": ONE, "before": ONE}, SHAPES, "do not go together"),
        ({"places": [1], "values": torch.tensor(1.0), "before": ONE}, SHAPES, "do not go together"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, parts: dict[str, Any], shapes: str, message: str) -> None:
    import safetensors.torch

    content = {f"0.bias/{part}": torch.as_tensor(value).clone() for part, value in parts.items()}
    meta = {"format": "adadagrad-delta-1", "shapes": shapes}
    safetensors.torch.save_file(content, tmp_path / "delta", metadata=meta)
    model = make_model(torch.float32)
    before = values(model)
    with pytest.raises(InvalidData, match=message):
        apply_delta(tmp_path / "delta", model)
    assert all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))


def test_a_file_that_is_no_delta_is_refused(tmp_path: Path) -> None:
    import safetensors.torch

    model = make_model(torch.float32)
    with pytest.raises(InvalidData, match="cannot be read as a delta"):
        apply_delta(tmp_path / "missing", model)
    (tmp_path / "text").write_text("no delta")
    with pytest.raises(InvalidData, match="cannot be read as a delta"):
        apply_delta(tmp_path / "text", model)
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(InvalidData, match="is no delta that save_delta wrote"):
        apply_delta(tmp_path / "other", model)
    tuned(tmp_path / "good")
    whole = (tmp_path / "good").read_bytes()
    (tmp_path / "short").write_bytes(whole[:-7])
    with pytest.raises(InvalidData, match="cannot be read as a delta"):
        apply_delta(tmp_path / "short", model)


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.delitem(sys.modules, "safetensors.torch", raising=False)
    with pytest.raises(MissingExtra, match=r"pip install 'adadagrad\[sift\]'"):
        save_delta(tmp_path / "delta", nn.Linear(1, 1), nn.Linear(1, 1).state_dict())
