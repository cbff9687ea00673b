"""Files that are complete or absent: write beside, fsync, rename."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write to in the block; it stands at `path` when the block ends, whole. After an error `path` is
    as it was.

    A reader sees the old file or the whole new one, never a part. Raises OSError (disk full, no permission).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_bytes(path: str | Path, data: bytes | memoryview) -> None:
    """Put `data` at `path`, as `whole_file`."""
    with whole_file(path) as file:
        file.write(data)


def write_json(path: str | Path, value: object) -> None:
    """`write_bytes` of a JSON object, indented for people."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: str | Path) -> dict:
    """The JSON object in a file. Raises OSError, ValueError."""
    value = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{Path(path).name} holds a {type(value).__name__}, expected a JSON object")
    return value


def sync_folder(path: str | Path) -> None:
    """Make renames inside the folder `path` survive a power loss."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
