"""Runs tests with other versions of a library, beside an environment that has the newest ones.

    python -m tests.integrations.versions transformers==5.0.0 accelerate==1.10.1 huggingface-hub==1.33.0 \
        tokenizers==0.22.2 -- tests/integrations/test_transformers*.py

A virtual environment in a temporary folder has the named versions, without what they depend on, and sees all else in
the present environment.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path


def run(packages: list[str], arguments: list[str]) -> int:
    """Return pytest's exit status with these packages in front."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *packages], check=True)
        where = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        (Path(where) / "zz_present.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        print(" ".join(packages), "on", sys.version.split()[0], flush=True)
        return subprocess.run([python, "-m", "pytest", *arguments], check=False).returncode


if __name__ == "__main__":
    split = sys.argv.index("--")
    sys.exit(run(sys.argv[1:split], sys.argv[split + 1 :]))
