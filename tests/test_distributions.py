"""What a user installs: the wheel and the source distribution hold what they should, and the wheel imports cleanly."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

pytest.importorskip("hatchling")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def python(*arguments: str, cwd: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": path, "PYTHONWARNINGS": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=environment, timeout=200
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    done = python("-m", "hatchling", "build", "-d", str(folder), cwd=ROOT, path=os.environ.get("PYTHONPATH", ""))
    assert done.returncode == 0, done.stderr
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    arguments = ["--no-deps", "--no-index", "--no-cache-dir", "--disable-pip-version-check", "--quiet"]
    done = python("-m", "pip", "install", *arguments, "--target", str(target), str(built[0]), cwd=target)
    assert done.returncode == 0, done.stderr
    return target


def package_files() -> set[str]:
    files = (path for path in (ROOT / "adadagrad").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        names = {name for name in wheel.namelist() if not name.startswith("adadagrad-")}
    assert names == package_files()
    assert "adadagrad/py.typed" in names
    assert sum(name.endswith(".j2") for name in names) >= 3


def test_its_metadata_is_complete(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        (folder,) = {name.partition("/")[0] for name in wheel.namelist() if name.startswith("adadagrad-")}
        metadata = email.message_from_string(wheel.read(f"{folder}/METADATA").decode())
        entries = ConfigParser()
        entries.read_string(wheel.read(f"{folder}/entry_points.txt").decode())
        licence = wheel.read(f"{folder}/licenses/LICENSE")
    assert entries["console_scripts"]["adadagrad"] == "adadagrad.cli:main"
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Summary"] == PROJECT["project"]["description"]
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    always = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert always == ["torch>=2.6"]
    assert set(metadata.get_all("Provides-Extra", [])) == set(PROJECT["project"]["optional-dependencies"])


def test_no_address_is_made_up(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_string(wheel.read(name).decode())
    addresses = [*metadata.get_all("Project-URL", []), metadata.get("Home-page", "")]
    assert not [address for address in addresses if "example" in address]
    assert sorted(PROJECT["project"].get("urls", {})) == sorted(
        address.partition(",")[0] for address in metadata.get_all("Project-URL", [])
    )


def test_it_imports_without_a_warning_and_the_command_starts(installed: Path, tmp_path: Path) -> None:
    script = (
        "import adadagrad, pathlib\n"
        f"assert pathlib.Path(adadagrad.__file__).is_relative_to({str(installed)!r}), adadagrad.__file__\n"
        "for name in adadagrad.__all__: getattr(adadagrad, name)\n"
        "print(adadagrad.__version__)\n"
    )
    done = python("-W", "error", "-c", script, cwd=tmp_path, path=str(installed))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == PROJECT["project"]["version"]
    done = python("-W", "error", "-m", "adadagrad", "--help", cwd=tmp_path, path=str(installed))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: adadagrad COMMAND")
    (command,) = (installed / "bin").glob("adadagrad*")
    assert command.is_file()


def test_the_installed_package_writes_a_report_from_its_templates(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    from tests.report.logs import small_run, write

    write(tmp_path / "run", small_run())
    done = python("-m", "adadagrad", "report", str(tmp_path / "run"), cwd=tmp_path, path=str(installed))
    assert (done.returncode, done.stderr) == (0, "")
    assert "<html" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_the_source_distribution_holds_what_the_project_says(built: tuple[Path, Path]) -> None:
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tops = {name.partition("/")[0] for name in names}
    made = {"PKG-INFO", "pyproject.toml", ".gitignore"}
    assert tops == {path.strip("/") for path in included} | made
    assert package_files() <= names
    assert "tests/test_distributions.py" in names
    assert "docs/how-to-choose.md" in names
    unwanted = (".pt", ".pyc", ".gz", "-ubyte", ".jsonl", ".npz")
    assert not [name for name in names if name.endswith(unwanted)]
    assert not [name for name in names if name.startswith(("results/", "runs/", "docs/_build/"))]
