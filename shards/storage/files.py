"""Files that are complete or absent: write beside, fsync, rename."""

import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from shards.storage.retry import is_final

Found = TypeVar("Found")

WAITS = (0.25, 0.5, 1.0, 2.0, 4.0)  # seconds between tries of `patiently`


@contextlib.contextmanager
def whole_file(path: str | Path, new: bool = False) -> Iterator[BinaryIO]:
    """A binary file to write to in the block; it stands at `path` when the block ends, whole. After an error `path` is
    as it was. new: a file that is there already stays.

    A reader sees the old file or the whole new one, never a part. Raises OSError (disk full, no permission).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")  # of no other process, on no other host
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        put(beside, path, new)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def put(beside: Path, path: Path, new: bool) -> None:
    """The file `beside` stands at `path`; if `new` only where there was none."""
    if new:
        try:
            return os.link(beside, path)
        except FileExistsError:
            return
        except OSError:  # a file system without links
            pass
    try:
        os.replace(beside, path)
    except FileNotFoundError:  # `remove_leftovers` of another process that has made the file too
        if not path.exists():
            raise


def remove_leftovers(paths: Iterable[Path]) -> None:
    """Remove what killed processes have left of the files `paths`, none of which has to be written any more."""
    names: dict[Path, set[str]] = {}
    for path in paths:
        names.setdefault(path.parent, set()).add(path.name)
    for folder, whole in names.items():
        for name in os.listdir(folder):
            if name.endswith(".part") and name[1:].rsplit(".", 2)[0] in whole:
                (folder / name).unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes | memoryview) -> None:
    """Put `data` at `path`, as `whole_file`."""
    with whole_file(path) as file:
        file.write(data)


def write_json(path: str | Path, value: object) -> None:
    """`write_bytes` of a JSON object, indented for people."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def patiently(read: Callable[[], Found]) -> Found:
    """read(), tried again for some 8 s after an OSError that may pass, as when a file server is replaced by another.

    Not after one that stays (no such file, no permission), or that a library raises of the content (without errno).
    """
    for wait in WAITS:
        try:
            return read()
        except OSError as error:
            if error.errno is None or is_final(error):
                raise
            time.sleep(wait)
    return read()


def claim_folder(mark: Path, value: dict, left: str = "") -> dict | None:
    """Note in a folder, in the new file `mark`, what it is used for, unless it holds files already; returns what stands
    in `mark` then, the same to all processes that claim it, also on several hosts. None: it holds files of others.

    Hidden files do not count, nor those whose names end with `left`.
    """
    folder = mark.parent
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        names = []
    except NotADirectoryError:
        return None
    if all(name.startswith(".") or left and name.endswith(left) for name in names):
        with whole_file(mark, new=True) as file:
            file.write((json.dumps(value, indent=1) + "\n").encode())
    try:
        return read_json(mark)
    except (OSError, ValueError):
        return None


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
