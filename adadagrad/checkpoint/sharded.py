"""A checkpoint of a sharded model: a folder to which every rank writes its own shards, whole or not at all.

torch.distributed.checkpoint writes the tensors that are sharded, each rank its part, and reads them on any number of
ranks. Everything else is one ordinary checkpoint file beside them. ``manifest.json`` holds size and SHA-256 of every
file and is written last; then the folder gets its name. Nothing is read before all files have been found to be whole.

The tensors' index, ``.metadata``, is a pickle, which could run code. So it is read by an unpickler that makes nothing
but what such an index consists of.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from adadagrad.checkpoint.file import load_checkpoint, save_checkpoint, write_through
from adadagrad.checkpoint.tree import Like, put_in, take_out
from adadagrad.core.comm import Ranks
from adadagrad.core.errors import CorruptCheckpoint

Content = TypeVar("Content")

REST = "engine.pt"
"""The file that holds all that is not sharded."""

MANIFEST = "manifest.json"

INDEX = frozenset({
    *(("pathlib", name) for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    *(("torch", name) for name in ("Size", "device", "float16", "bfloat16", "float32", "float64")),
    *(("torch", name) for name in ("int8", "uint8", "int16", "int32", "int64", "bool")),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
})
"""What an index of torch 2.13 consists of."""


def save_sharded(path: Path, content: dict[str, Any], ranks: Ranks) -> None:
    """Write a checkpoint folder; a collective.

    Args:
        path: The folder; an older one is replaced.
        content: Nested dicts and lists of tensors, DTensors among them, numbers, words and None.
        ranks: The ranks, all of which see the same file system.

    Raises:
        OSError: It could not be written, here or on another rank.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    rest, tensors = take_out(content)
    temporary, old = path.with_name(path.name + ".tmp"), path.with_name(path.name + ".old.tmp")

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def end() -> None:
        save_checkpoint(temporary / REST, rest)
        _seal(temporary)
        if path.exists():
            _clear(old)  # which a process that was killed here has left
            path.replace(old)
        temporary.replace(path)
        write_through(path.parent)
        _clear(old)

    on_first(begin, path, ranks)
    try:
        with _alone(ranks):
            save(dict(tensors), checkpoint_id=temporary, process_group=ranks.group, no_dist=ranks.count == 1)
    except CheckpointException as error:
        raise OSError(f"{path} could not be written: {error}") from error
    on_first(end, path, ranks)


def load_sharded(path: Path, like: Like, ranks: Ranks) -> dict[str, Any]:
    """Read a checkpoint folder, after verifying its files; a collective.

    Args:
        path: The folder.
        like: How the tensors shall lie on these ranks, whose number need not be that of the ranks that wrote them.
        ranks: The ranks.

    Returns:
        The content; tensors of which `like` knows nothing whole and on the CPU.

    Raises:
        CorruptCheckpoint: A file is missing, damaged, or not one of a checkpoint; on all ranks alike.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    content, tensors = put_in(on_all(lambda: _verified(path, ranks), path, ranks), like)
    try:
        with _alone(ranks):
            reader = _reader(path)
            load(dict(tensors), storage_reader=reader, process_group=ranks.group, no_dist=ranks.count == 1)
    except CheckpointException as problem:
        raise CorruptCheckpoint(f"{path} is not a readable checkpoint ({problem}): use an earlier one") from problem
    result: dict[str, Any] = content
    return result


def on_all(load: Callable[[], Content], path: Path, ranks: Ranks) -> Content:
    """Read something on every rank, or on none.

    Args:
        load: Reads it.
        path: The file or folder that it is read from.
        ranks: The ranks.

    Returns:
        What `load` returns here.

    Raises:
        CorruptCheckpoint: It cannot be read, here or on another rank.
    """
    content, error = None, None
    try:
        content = load()
    except CorruptCheckpoint as problem:
        error = problem
    (failed,) = ranks.sum(float(error is not None))
    if error is not None:
        raise error
    if failed or content is None:
        raise CorruptCheckpoint(f"{path} cannot be read on {failed:.0f} other ranks: give all the same file system")
    return content


def on_first(action: Callable[[], None], path: Path, ranks: Ranks) -> None:
    """Do something on the first rank, while the others wait and learn whether it failed.

    Args:
        action: What to do.
        path: The file or folder that it is about.
        ranks: The ranks.

    Raises:
        OSError: It failed on the first rank.
    """
    error: Exception | None = None
    if ranks.index == 0:
        try:
            action()
        except Exception as problem:
            error = problem
    (failed,) = ranks.sum(float(error is not None))
    if error is not None:
        raise error
    if failed:
        raise OSError(f"{path} could not be written on the first rank")


def _clear(path: Path) -> None:
    """Delete a folder, or a file, if there is one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _alone(ranks: Ranks) -> Iterator[None]:
    """Let torch.distributed.checkpoint not warn that there is one process, where there is one."""
    with warnings.catch_warnings():
        if ranks.count == 1:
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _seal(folder: Path) -> None:
    """Write the manifest, and wait until it and the list of files are on the disk; the files are there already."""
    files = {file.name: {"bytes": file.stat().st_size, "sha256": _digest(file)} for file in sorted(folder.iterdir())}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps(files, indent=1), encoding="utf-8")
    write_through(manifest)
    write_through(folder)


def _verified(path: Path, ranks: Ranks) -> dict[str, Any]:
    """Return what is not sharded in a folder whose files are whole; the ranks share the reading of them."""
    damaged = _damaged(path, ranks)
    if damaged:
        raise CorruptCheckpoint(f"{path} is damaged ({damaged}): use an earlier one")
    return load_checkpoint(path / REST)


def _damaged(folder: Path, ranks: Ranks) -> str:
    """Return which file is not what was written, of those that fall to this rank; an empty word where all are."""
    try:
        expected = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for number, (name, entry) in enumerate(expected.items()):
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"size of {name}"
            if number % ranks.count == ranks.index and _digest(file) != entry["sha256"]:
                return f"checksum of {name}"
        return "" if REST in expected else f"{MANIFEST} names no {REST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST}: {error}"


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _reader(path: Path) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    class Reader(FileSystemReader):
        """One whose index is unpickled without trust."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            """Return the index."""
            with (path / ".metadata").open("rb") as file:
                metadata = _IndexUnpickler(file).load()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(path)


class _IndexUnpickler(pickle.Unpickler):
    """Makes what an index consists of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in INDEX:
            raise CorruptCheckpoint(f"the index of a checkpoint holds {module}.{name}, which belongs in none")
        return super().find_class(module, name)
