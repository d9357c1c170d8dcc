"""``adadagrad perturb``: what it measures, leaves and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adadagrad.apps.universal_perturbation import evaluate, load_perturbation
from adadagrad.cli import main
from adadagrad.cli.data import load_data
from adadagrad.cli.models import mlp
from tests.cli.neighbours import page_of, rows_of

for package in ("tyro", "sklearn", "matplotlib", "jinja2"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """State dicts of two perceptrons that know the digits."""
    folder = tmp_path_factory.mktemp("models")
    images, labels = load_data("digits").train.tensors  # type: ignore[attr-defined]
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = mlp((1, 8, 8), 10)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(60):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        torch.save(model.state_dict(), folder / f"{seed}.pt")
    return folder


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def perturb(models: Path, *arguments: str, out: str = "run") -> int:
    return main(["perturb", "--model", "mlp", "--checkpoint", str(models / "0.pt"), *arguments, "--out", out])


def test_numbers_file_and_page(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert perturb(models, "--images", "100", "--epochs", "8", "--transfer", f"mlp:{models / '1.pt'}") == 0
    own, other = rows_of(Path("run"))
    assert own["clean_accuracy"] > 0.9
    assert own["fooling_ratio"] > own["random_sign"]["fooling_ratio"] + 0.05
    assert other["model"].startswith("mlp:")
    assert 0 < other["fooling_ratio"] < own["fooling_ratio"]
    assert own["gradient_count"] == 8 * 4 * 100
    perturbation = load_perturbation(Path("run") / "perturbation.pt")
    model = mlp((1, 8, 8), 10)
    model.load_state_dict(torch.load(models / "0.pt", weights_only=True))
    held_out = torch.utils.data.DataLoader(load_data("digits").held_out, 50)
    assert evaluate(model.eval(), perturbation, held_out).fooling_ratio == own["fooling_ratio"]
    printed = capsys.readouterr().out
    assert "sga at eps 0.15: accuracy" in printed
    assert "random at eps 0.15" in printed
    page = page_of(Path("run"))
    assert "A lower bound of the vulnerability" in page
    assert page.count('xlink:href="data:image/png;base64') + page.count('href="data:image/png;base64') >= 17
    assert f"{100 * own['fooling_ratio']:.1f} %" in page


@pytest.mark.parametrize(
    "arguments",
    [
        *([["--method", name] for name in ("spgd", "aggregation")]),
        ["--eps", "0.05"],
        ["--images", "60"],
        ["--epochs", "3"],
        ["--k", "1"],
        ["--small-batch", "5"],
        ["--large-batch", "20"],
        ["--loss", "neg_logit"],
        ["--momentum", "0"],
        ["--target", "3"],
        ["--seed", "1"],
    ],
    ids=" ".join,
)
def test_a_flag_changes_the_perturbation(models: Path, arguments: list[str]) -> None:
    short = ["--images", "40", "--epochs", "2", "--large-batch", "30"]
    assert perturb(models, *short, out="base") == 0
    assert perturb(models, *[*short, *arguments], out="other") == 0
    base, other = (load_perturbation(Path(name) / "perturbation.pt").delta for name in ("base", "other"))
    assert not torch.equal(base, other)


def test_beta_cuts_the_loss_off(models: Path) -> None:
    """With a cut-off below every loss nothing moves."""
    assert perturb(models, "--images", "40", "--epochs", "2", "--beta", "1e-9") == 0
    assert load_perturbation(Path("run") / "perturbation.pt").linf_norm == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eps", "-0.1"], "--eps must be"),
        (["--eps", "nan"], "--eps must be"),
        (["--method", "sgd"], "unknown method 'sgd'"),
        (["--epochs", "0"], "--epochs must be >= 1"),
        (["--images", "0"], "--images must be >= 1"),
        (["--momentum", "1"], "--momentum must be"),
        (["--target", "12"], "--target"),
        (
            ["--method", "random", "--epochs", "3"],
            "--epochs is not used here: leave it out, or choose another --method",
        ),
        (["--method", "spgd", "--k", "3"], "--k is not used here: leave it out, or choose --method sga"),
        (["--loss", "neg_logit", "--beta", "3"], "--beta is not used here"),
        (["--seed", "9" * 25], "--seed must be below 2**63"),
        (["--model", "cnn"], "is of another model"),
        (["--transfer", "mlp"], "--transfer mlp: expected model:checkpoint"),
        (["--checkpoint", "none.pt"], "--checkpoint none.pt does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(
    models: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert perturb(models, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("run").exists()


def test_weights_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["perturb"]) == 2
    assert "--checkpoint must be given" in capsys.readouterr().err


def test_images_outside_their_range_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "import torch\nfrom torch.utils.data import TensorDataset\n"
        "def data():\n    x = 2 * torch.rand(40, 1, 8, 8)\n    d = TensorDataset(x, torch.arange(40) % 10)\n"
        "    return d, d\n"
    )
    (folder / "bright_images.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    torch.save(mlp((1, 8, 8), 10).state_dict(), "weights.pt")
    arguments = ["--data", "bright_images:data", "--model", "mlp", "--checkpoint", "weights.pt"]
    assert main(["perturb", *arguments, "--out", "run"]) == 2
    assert "[0, 1]" in capsys.readouterr().err
    assert not Path("run").exists()
