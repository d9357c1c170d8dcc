"""The data that names stand for, and what is said where there is none."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from adadagrad.cli.data import load_data
from adadagrad.core.errors import InvalidArgument, InvalidData, MissingExtra, UnknownName
from tests.cli.mnist_folder import idx_bytes, real_data, write_mnist


def test_digits_are_split_once_and_for_all() -> None:
    pytest.importorskip("sklearn")
    first, second = load_data("digits"), load_data("digits")
    assert (len(first.train), len(first.held_out), first.split) == (1437, 360, "val")
    assert (first.input_shape(), first.num_classes()) == ((1, 8, 8), 10)
    assert isinstance(first.train, TensorDataset)
    assert isinstance(second.train, TensorDataset)
    assert isinstance(first.held_out, TensorDataset)
    assert torch.equal(first.train.tensors[0], second.train.tensors[0])
    images = torch.cat([first.train.tensors[0], first.held_out.tensors[0]])
    assert images.min() == 0
    assert images.max() == 1
    assert len(images.unique(dim=0)) == 1797  # no image on both sides of the split


def test_digits_split_leaves_the_random_state_alone() -> None:
    pytest.importorskip("sklearn")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load_data("digits")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("compress", [False, True])
def test_mnist_folder(tmp_path: Path, compress: bool) -> None:
    data = load_data(f"mnist:{write_mnist(tmp_path, compress=compress)}")
    assert (len(data.train), len(data.held_out), data.split) == (40, 10, "test")
    assert (data.input_shape(), data.num_classes()) == ((1, 28, 28), 10)
    image, label = data.train[20]
    assert image.dtype == torch.float32
    assert torch.allclose(image, torch.full((1, 28, 28), 20 / 255))
    assert label == 0


def test_real_mnist() -> None:
    data = load_data(f"mnist:{real_data('mnist')}")
    assert (len(data.train), len(data.held_out)) == (60_000, 10_000)
    assert isinstance(data.train, TensorDataset)
    assert data.train.tensors[1][:5].tolist() == [5, 0, 4, 1, 9]


def test_mnist_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="name the folder"):
        load_data("mnist:")
    with pytest.raises(InvalidData, match="nowhere is not a folder"):
        load_data(f"mnist:{tmp_path / 'nowhere'}")
    with pytest.raises(InvalidData, match=r"holds neither train-images-idx3-ubyte nor train-images-idx3-ubyte\.gz"):
        load_data(f"mnist:{tmp_path}")


def test_mnist_with_a_label_too_few(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes((39,), bytes(39)))
    with pytest.raises(InvalidData, match=r"train-images-idx3-ubyte holds 40 images, but .* 39 labels"):
        load_data(f"mnist:{tmp_path}")


MODULE = """
import torch
from torch.utils.data import TensorDataset

def pair():
    return TensorDataset(torch.zeros(6, 3), torch.arange(6)), TensorDataset(torch.zeros(2, 3), torch.arange(2))

def rows():
    return [(torch.zeros(3), 4), (torch.zeros(3), 2)], [(torch.zeros(3), 1)]

def single():
    return torch.zeros(3)

def boom():
    raise RuntimeError("boom")

def needs(path, more=1):
    return path

number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_task.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_task", raising=False)
    return "own_task"


def test_own_function(own: str) -> None:
    data = load_data(f"{own}:pair")
    assert (len(data.train), len(data.held_out), data.num_classes()) == (6, 2, 6)
    rows = load_data(f"{own}:rows")
    assert (rows.input_shape(), rows.num_classes(), rows.split) == ((3,), 5, "val")


def test_own_function_that_does_not_fit(own: str) -> None:
    with pytest.raises(InvalidData, match=r"must return \(train_dataset, validation_dataset\), got Tensor"):
        load_data(f"{own}:single")
    with pytest.raises(InvalidArgument, match="must be a function, got int"):
        load_data(f"{own}:number")
    with pytest.raises(UnknownName, match="unknown function in own_task 'pare': did you mean pair"):
        load_data(f"{own}:pare")
    with pytest.raises(InvalidArgument, match="cannot import no_such_module"):
        load_data("no_such_module:pair")
    with pytest.raises(InvalidArgument, match="is called without arguments, but needs path"):
        load_data(f"{own}:needs")
    with pytest.raises(InvalidArgument, match=r"raised RuntimeError: boom \(own_task\.py, line 15\)"):
        load_data(f"{own}:boom")
    with pytest.raises(InvalidArgument, match="json:loads is called without arguments, but needs s"):
        load_data("json:loads")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:", r"importing broken_task raised SyntaxError: "),
        ("raise ValueError('at import')", r"raised ValueError: at import \(broken_task\.py, line 1\)"),
        ("import sys; sys.exit(3)", r"raised SystemExit: 3"),
        ("import not_there", r"cannot import broken_task \(No module named 'not_there'\)"),
    ],
)
def test_a_module_that_cannot_be_imported(own: str, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.delitem(sys.modules, "broken_task", raising=False)
    Path("broken_task.py").write_text(text)
    importlib.invalidate_caches()
    with pytest.raises(InvalidArgument, match=message):
        load_data("broken_task:load")


def test_unknown_names() -> None:
    with pytest.raises(UnknownName, match="unknown data 'digit': did you mean digits"):
        load_data("digit")
    with pytest.raises(InvalidArgument, match=r"expected digits, mnist:DIR or package\.module:function"):
        load_data("cifar:/some/where")


def test_missing_scikit_learn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtra, match=r"scikit-learn is not installed: pip install 'adadagrad\[cli\]'"):
        load_data("digits")
