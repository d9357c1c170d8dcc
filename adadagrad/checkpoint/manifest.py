"""The manifest inside a checkpoint file: the SHA-256 of every record of its zip archive, in a record of its own.

It lies in the same file, so that no crash can part the two, in the archive's own folder, where torch reads past it. A
file without one, which an older version wrote, is verified by the archive's own 32-bit checksums alone.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

NAME = "manifest.json"
"""The record's name in the folder of the archive that holds all the others."""


def seal(path: Path) -> None:
    """Add the manifest to an archive that holds everything else.

    Args:
        path: The file, as `torch.save` has written it.
    """
    # Given a path that it cannot open, zipfile would empty the file and go on.
    with path.open("r+b") as file, zipfile.ZipFile(file, "a") as archive:
        names = archive.namelist()
        folder = names[0].partition("/")[0]
        archive.writestr(f"{folder}/{NAME}", json.dumps({name: digest(archive, name) for name in names}, indent=1))


def damaged_record(path: Path) -> str | None:
    """Return the name of a record that is not what was written, or is missing; None for an archive that is whole.

    Args:
        path: The file.

    Returns:
        The first such name; reading an archive that is no archive raises what `zipfile` raises.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        names = archive.namelist()
        manifest = next((name for name in names if name.endswith(f"/{NAME}")), None)
        if damaged is not None or manifest is None:
            return damaged
        expected: dict[str, str] = json.loads(archive.read(manifest))
        for name in names:
            if name != manifest and name not in expected:
                return name
        for name, value in expected.items():
            if name not in names or digest(archive, name) != value:
                return name
    return None


def digest(archive: zipfile.ZipFile, name: str) -> str:
    """Return the SHA-256 of a record, in hexadecimal digits, read a megabyte at a time.

    Args:
        archive: The open archive.
        name: The record's name.
    """
    found = hashlib.sha256()
    with archive.open(name) as record:
        while block := record.read(1 << 20):
            found.update(block)
    return found.hexdigest()
