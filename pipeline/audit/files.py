"""Files of the mask commands: shards found and read as the mask knows them, and files that people name."""

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from shards.errors import UserError
from shards.index import tar
from shards.index.names import named
from shards.order.safe_mask import SavedMask, require_same
from shards.shares import Share
from shards.storage.files import whole_file


class Member(NamedTuple):
    """A member of a sample. Bytes start to stop of the tar: its headers, content and padding; offset and length: its
    content."""

    position: int
    extension: str
    start: int
    stop: int
    offset: int
    length: int


@contextlib.contextmanager
def output(path: Path | str) -> Iterator[BinaryIO]:
    """shards.storage.files.whole_file for a file that a person has named. Raises UserError where there can be none; a
    full disk stays what it is."""
    if Path(path).is_dir():
        raise UserError(f"file {path}: Is a directory; name one that can be written")
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(whole_file(path))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise UserError(f"file {path}: {error.strerror}; name one that can be written") from None
        yield file


def find_shards(saved: SavedMask, patterns: Iterable[str | Path], share: Share = Share()) -> dict[int, Path]:
    """{number of the shard in the mask: its path}, as `patterns` name them (shards.index.names). Of the share's own
    sizes are compared, contents not yet.

    Raises UserError naming the shard: missing, not of the mask `saved`, named twice, of another size.
    """
    found: dict[int, Path] = {}
    for place, path in enumerate(map(Path, named(patterns))):
        with share.alone():
            if share.has(place) and not path.is_file():
                raise UserError(f"shard {path}: missing; check the path")
        number = saved.find(str(path))
        if number in found:
            raise UserError(
                f"shard {path}: is {saved.shards[number]['name']} of the mask, as {found[number]} is; name one"
            )
        found[number] = path
        expected = saved.shards[number]["bytes"]
        with share.alone():
            if share.has(place) and (size := path.stat().st_size) != expected:
                raise UserError(
                    f"shard {path}: has {size} bytes, the mask was made for {expected} (fingerprint "
                    f"{saved.shards[number]['fingerprint']}); use the shard that it was made with"
                )
    return found


def members(path: Path | str, fingerprint: str) -> list[Member]:
    """Those of a shard in order, positions as in its index. Raises UserError if its content is not
    `fingerprint`."""
    found, position, key_now = [], -1, None
    with open(path, "rb") as file:
        stream = tar.Stream(file)
        # Damage is no news here: who made the mask has indexed what is intact, and the fingerprint is of all bytes.
        for member in tar.members(stream, os.path.getsize(path), lambda *damage: None):
            # What stands before a member and is no file (long names, folders) goes with it.
            key, extension = tar.sample_of(member.name)
            if key is None:
                continue
            if key != key_now:
                position, key_now = position + 1, key
            found.append(Member(position, extension, member.start, member.stop, member.offset, member.length))
        stream.skip_to(os.path.getsize(path))
    require_same(path, stream.fingerprint(), fingerprint)
    return found
