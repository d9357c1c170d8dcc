"""Tensors go through Flower's arrays and come back bit for bit, in every dtype that a parameter may have."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adadagrad.core.errors import InvalidArgument

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'adadagrad[flower]'")

from flwr.app import Array, ArrayRecord

from adadagrad.integrations.flower.arrays import from_record, load, to_record, trained
from adadagrad.integrations.flower.client import client_app


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 1, 3)])
def test_tensors_come_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors = {"a": torch.randn(shape).to(dtype), "b.weight": torch.randn(2, 5).to(dtype).t()}
    back = from_record(to_record(tensors), tensors)
    assert list(back) == ["a", "b.weight"]
    for name, tensor in tensors.items():
        assert (back[name].dtype, back[name].shape) == (dtype, tensor.shape)
        assert torch.equal(back[name], tensor)


def test_what_comes_back_shares_no_memory_with_what_was_sent() -> None:
    weight = nn.Parameter(torch.ones(3))
    record = to_record({"weight": weight})
    with torch.no_grad():
        weight.zero_()
    back = from_record(record, {"weight": weight})
    back["weight"].add_(1)
    assert back["weight"].tolist() == [2.0, 2.0, 2.0]
    assert from_record(record, {"weight": weight})["weight"].tolist() == [1.0, 1.0, 1.0]


def test_strings_are_no_numbers() -> None:
    import numpy as np

    with pytest.raises(InvalidArgument, match="w cannot be read: "):
        from_record(ArrayRecord({"w": Array(np.array(["a", "b"]))}), {"w": torch.zeros(2)})


def test_a_model_takes_a_record_whole_or_not_at_all() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = {name: tensor + 1 for name, tensor in start.items()}
    spoilt = {**changed, "1.weight": torch.zeros(3)}
    with pytest.raises(InvalidArgument, match=r"1\.weight has shape \(3,\), not \(2,\)"):
        load(model, ArrayRecord(spoilt))
    assert all(torch.equal(tensor, start[name]) for name, tensor in model.state_dict().items())
    load(model, ArrayRecord(changed))  # with buffers and the frozen bias, which stay
    assert set(trained(model)) == {"0.weight", "1.weight", "1.bias"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (changed if name in trained(model) else start)[name])


def test_a_client_app_travels_by_pickle() -> None:
    """Flower's simulation sends the app to other processes."""
    import pickle

    from tests.integrations.fake_grid import loss, make_dataset, make_model

    app = client_app(make_model, make_dataset, loss, seed=4)
    again = pickle.loads(pickle.dumps(app._registered_funcs["train.default"].__self__))  # type: ignore[attr-defined]
    assert (again.seed, again.loss, again.make_model) == (4, loss, make_model)
