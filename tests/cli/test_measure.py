"""``adadagrad measure`` from end to end: in a brief training, and at weights that stand still."""

from __future__ import annotations

import signal
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adadagrad.cli import main
from adadagrad.cli import measure as measure_module
from adadagrad.cli.measure import Watch
from adadagrad.cli.measure_arguments import budget, parse_measure, settings_to_measure
from adadagrad.cli.progress import PlainProgress
from adadagrad.cli.weights import load_weights
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.records import Decision
from adadagrad.report.answers import WATCHING
from adadagrad.report.noise import stretches
from adadagrad.report.reader import read_run

for package in ("tyro", "sklearn", "matplotlib", "jinja2"):
    pytest.importorskip(package)

TASK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def data():
    made = torch.Generator().manual_seed(0)
    inputs = torch.randn(240, 6, generator=made)
    labels = (inputs[:, :3] + 2 * torch.randn(240, 3, generator=made)).argmax(dim=1)
    return TensorDataset(inputs[:200], labels[:200]), TensorDataset(inputs[200:], labels[200:])

def model():
    return nn.Linear(6, 3)

def mixing():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
"""
OWN = ["--data", "batch_size_task:data", "--model", "batch_size_task:model", "--global-batch-size", "20"]
BRIEF = [*OWN, "--samples", "1200"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "batch_size_task.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_brief_training_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", *BRIEF]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("60 steps of 20 examples of training with Adagrad, all measured:")
    for text in (
        "diminishing returns",
        "norm test, eta 0.25",
        "augmented test, 0.9 and 5.84 *",
        "8 x 20 = 160",
        "examples per step",
    ):
        assert text in " ".join(output.out.split())
    assert "report: runs/measure-001/report.html" in output.out
    assert {path.name for path in Path("runs/measure-001").iterdir()} == {"config.toml", "run.jsonl", "report.html"}
    page = Path("runs/measure-001/report.html").read_text()
    assert "Which batch size" in page
    assert "Noise scale against samples" in page
    run = read_run("runs/measure-001")
    assert {step.global_batch_size for step in run.steps} == {20}
    assert all(step.inner_product_variance is not None for step in run.steps)
    assert run.start["policy"] == WATCHING == repr(Watch())


def test_a_rate_that_counts_progress_itself_ends_the_run_by_it(capsys: pytest.CaptureFixture[str]) -> None:
    """A base batch above the batch makes more progress than examples: the run ends before it has seen as many."""
    rate = ["--rate", "adascale", "--base-batch-size", "40"]
    assert main(["measure", *BRIEF, *rate, "--out", "here"]) == 0
    run = read_run("here")
    assert run.end is not None
    assert run.steps[-1].samples_seen < 1200


def test_the_page_can_be_made_again_from_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    main(["measure", *BRIEF, "--out", "here"])
    first = Path("here/report.html").read_text()
    assert main(["report", "here"]) == 0
    assert Path("here/report.html").read_text() == first


def test_its_configuration_trains(capsys: pytest.CaptureFixture[str]) -> None:
    main(["measure", *BRIEF, "--lr", "0.02", "--out", "here"])
    assert main(["train", "--config", "here/config.toml", "--out", "again"]) == 0
    assert [s.loss for s in read_run("here").steps] == [s.loss for s in read_run("again").steps]


def exact_noise_scale(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    """V / |grad F|^2 over all examples, by a loop over them."""
    units = []
    for x, y in zip(inputs, labels, strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), list(model.parameters()))
        units.append(torch.cat([g.flatten() for g in gradients]).double())
    stacked = torch.stack(units)
    return float(stacked.var(dim=0).sum() / stacked.mean(dim=0).square().sum())


@pytest.mark.parametrize("kind", ["state dict", "wrapped", "engine"])
def test_at_the_weights_of_a_checkpoint_it_finds_their_noise_scale(kind: str) -> None:
    import batch_size_task as task  # type: ignore[import-not-found]

    path = Path("weights.pt")
    if kind == "engine":
        main(["train", *OWN, "--policy", "constant", "--samples", "400", "--out", "trained"])
        path = Path("trained/checkpoint.pt")
    else:
        torch.manual_seed(11)
        state = task.model().state_dict()
        torch.save({f"module.{k}": v for k, v in state.items()} if kind == "wrapped" else state, path)
    assert main(["measure", *OWN, "--samples", "6000", "--checkpoint", str(path), "--out", "run"]) == 0
    model = task.model()
    load_weights(model, path)
    train, _ = task.data()
    truth = exact_noise_scale(model, *train.tensors)
    run = read_run("run")
    (whole,) = stretches(run, most=1)
    low, high = whole.noise.interval()
    assert low <= truth <= high < 2 * low
    assert {step.lr for step in run.steps} == {0.0}
    config = Path("run/config.toml").read_text()
    assert config.startswith(f"# weights from {path.absolute()}\n")
    assert tomllib.loads(config)["optimizer"]["lr"] == 0


def test_a_model_that_mixes_examples_is_measured_in_micro_batches(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [word.replace(":model", ":mixing") for word in BRIEF]
    assert main(["measure", *arguments, "--out", "run"]) == 0
    assert "examples per step" in capsys.readouterr().out


def _weights(folder: Path) -> None:
    torch.manual_seed(0)
    torch.save(nn.Linear(6, 3).state_dict(), folder / "good.pt")
    torch.save(nn.Linear(5, 3).state_dict(), folder / "other.pt")
    torch.save({"epoch": 3, "model": {}}, folder / "nested.pt")
    torch.save(nn.Linear(6, 3), folder / "module.pt")
    torch.save(torch.zeros(3), folder / "tensor.pt")
    content = bytearray((folder / "good.pt").read_bytes())
    numbers = bytes(torch.load(folder / "good.pt")["weight"].flatten().view(torch.uint8).tolist())
    content[content.index(numbers) + 5] ^= 1
    (folder / "flipped.pt").write_bytes(content)
    (folder / "empty.pt").write_bytes(b"")
    (folder / "polluted.toml").write_text("[batch]\npolicy = 3\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "100"], "100 samples hold 5 steps of 20, of which 5 would be measured, and 10 are the fewest"),
        (["--measure-every", "3", "--samples", "500"], "give --samples 560 or more"),
        (["--global-batch-size", "500"], "--global-batch-size must not exceed the 200 examples"),
        (["--global-batch-size", "1"], "--global-batch-size must be >= 2"),
        (["--global-batch-size", "0"], "--global-batch-size must be >= 1, got 0"),
        (["--samples", "0"], "--samples must be >= 1, got 0"),
        (["--measure-every", "0"], "--measure-every must be >= 1, got 0"),
        (["--max-examples", "1"], "--max-examples must be >= 2, got 1"),
        (["--momentum", "0.9"], "--momentum is not used with --optimizer adagrad"),
        (["--max-overhead", "0.9"], "--max-overhead is not used with --measure-every 1"),
        (["--config", "polluted.toml"], "policy of [batch] in polluted.toml must be a string, got 3"),
        (["--config", "none.toml"], "--config none.toml cannot be read"),
        (["--checkpoint", "."], "--checkpoint . is a folder: give a file, such as checkpoint.pt"),
        (["--checkpoint", "none.pt"], "--checkpoint none.pt does not exist"),
        (["--checkpoint", "empty.pt"], "--checkpoint empty.pt is damaged, or holds something else than weights"),
        (["--checkpoint", "module.pt"], "--checkpoint module.pt is damaged, or holds something else than weights"),
        (["--checkpoint", "flipped.pt"], "--checkpoint flipped.pt is damaged"),
        (["--checkpoint", "tensor.pt"], "--checkpoint tensor.pt holds a Tensor: give a file of engine.save"),
        (["--checkpoint", "nested.pt"], "(it holds epoch, model): save model.state_dict() by itself"),
        (
            ["--checkpoint", "other.pt"],
            "other.pt is of another model (weight is (3, 5) instead of (3, 6)): give the --model and --data",
        ),
        (["--checkpoint", "good.pt", "--lr", "1"], "--lr is not used with --checkpoint"),
        (["--checkpoint", "good.pt", "--lr-schedule=cosine"], "--lr-schedule is not used with --checkpoint"),
        (["--checkpoint", "good.pt", "--model", "mlp"], "is of another model (it lacks 1.weight, 1.bias, 3.weight"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_trace(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    _weights(folder)
    assert main(["measure", *OWN, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("adadagrad: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(folder.glob("runs/*"))


@pytest.mark.parametrize(
    ("after", "says"), [(3, "stopped after 3 measured steps, and 10 are"), (12, "stopped after 12")]
)
def test_ctrl_c_prints_what_is_known_so_far(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], after: int, says: str
) -> None:
    class Pressed(PlainProgress):
        def step(self, decision: Decision) -> None:
            if decision.step == after:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(measure_module, "progress_display", Pressed)
    assert main(["measure", *BRIEF, "--out", "run"]) == 130
    output = capsys.readouterr()
    assert says in output.err
    assert ("examples per step" in output.out) == (after >= 10)
    assert Path("run/report.html").is_file()


def test_steps_that_cannot_be_measured_are_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure_module, "measured_rows", lambda run: run.steps[:4])
    assert main(["measure", *BRIEF, "--out", "run"]) == 2
    assert "only 4 steps could be measured, and 10 are the fewest that say anything" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "dataset", "samples"), [(64, 1437, 28_740), (64, 60_000, 60_000), (4096, 60_000, 204_800)]
)
def test_the_budget_without_a_flag(size: int, dataset: int, samples: int) -> None:
    assert budget(parse_measure(["--global-batch-size", str(size)]), dataset) == samples
    assert budget(parse_measure(["--samples", "777"]), dataset) == 777


def test_a_configuration_gives_problem_batch_and_optimizer_but_no_budget() -> None:
    Path("run.toml").write_text(
        '[problem]\nmodel = "cnn"\n[batch]\npolicy = "norm"\nglobal_batch_size = 16\nmax_growth = 2.0\n'
        "[optimizer]\nlr = 0.5\n[measure]\nmeasure_every = 9\n[run]\nseed = 5\nsamples = 3\n"
    )
    command = parse_measure(["--config", "run.toml", "--lr", "0.25"])
    settings = settings_to_measure(command, budget(command, 100))
    assert (settings.problem.model, settings.run.seed, settings.run.samples) == ("cnn", 5, 2000)
    assert (settings.batch.policy, settings.batch.global_batch_size, settings.batch.max_growth) == (
        "constant",
        16,
        None,
    )
    assert (settings.optimizer.lr, settings.measure.measure_every) == (0.25, 1)


def test_weights_are_not_touched_by_those_of_another_model() -> None:
    torch.save(nn.Linear(5, 3).state_dict(), "other.pt")
    model = nn.Linear(6, 3)
    before = model.weight.clone()
    with pytest.raises(InvalidArgument, match="of another model"):
        load_weights(model, Path("other.pt"))
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("prefixes", ["", "_orig_mod.module.", "module._orig_mod.", "module.module.", "module."])
def test_wrapping_is_taken_off_in_any_order_but_not_what_the_model_calls_itself(prefixes: str) -> None:
    saved, model = nn.Linear(6, 3), nn.Linear(6, 3)
    state = {f"{prefixes}{name}": value for name, value in saved.state_dict().items()}
    torch.save(state, "wrapped.pt")
    load_weights(model, Path("wrapped.pt"))
    assert torch.equal(model.weight, saved.weight)
    named = nn.Module()
    named.module = nn.Linear(6, 3)
    torch.save({f"{prefixes}{name}": value for name, value in saved.state_dict(prefix="module.").items()}, "named.pt")
    load_weights(named, Path("named.pt"))
    assert torch.equal(named.module.weight, saved.weight)
