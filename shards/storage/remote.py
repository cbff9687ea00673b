"""Shards behind URLs: http(s), s3, gs and whatever else fsspec opens; `pipe:` commands where they are allowed.

Servers fail and hang. What fails is tried again with back-off, from the byte that was reached; when no new byte has
come for `timeout` seconds it is an error. Credentials and endpoints are the backends' own: AWS_ENDPOINT_URL,
FSSPEC_S3='{"anon": true}', ...
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, BinaryIO

from shards.errors import UserError
from shards.storage.retry import persist

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem  # which takes a while to load

TIMEOUT = 120.0  # seconds
CHUNK = 8 << 20  # bytes of one request
MARKS = ("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "generation", "LastModified", "last_modified", "mtime")


def is_remote(path: str) -> bool:
    """Whether a shard's path is a URL or a `pipe:` command."""
    return "://" in path or path.startswith("pipe:")


def about(url: str, timeout: float = TIMEOUT) -> tuple[int | None, str | None]:
    """(bytes, mark that changes with the content); None for what the server does not tell. Raises UserError."""
    if url.startswith("pipe:"):
        return None, None

    def ask() -> dict:
        system, path = connect(url)
        return system.info(path)

    info = persist(url, ask, timeout)
    marks = (info.get(name) for name in MARKS)
    return info.get("size"), next((str(mark) for mark in marks if mark), None)


def read_range(url: str, offset: int, size: int, timeout: float = TIMEOUT) -> bytes:
    """`size` bytes from `offset` on, fewer at the end, by one request; not of a command. Raises UserError."""
    refuse_pipe(url, False)

    def ask() -> bytes:
        system, path = connect(url)
        return system.cat_file(path, start=offset, end=offset + size)

    data = persist(url, ask, timeout)
    return data if len(data) <= size else data[offset : offset + size]  # a server that knows no ranges sends all


def open_shard(
    path: str, size: int | None, timeout: float = TIMEOUT, allow_pipe: bool = False
) -> BinaryIO | RemoteFile:
    """A binary file of a shard, local or behind a URL, to be read once from its begin. Raises UserError."""
    if not is_remote(path):
        return open(path, "rb")
    refuse_pipe(path, allow_pipe)
    return RemoteFile(path, size, timeout)


def refuse_pipe(path: str, allow_pipe: bool) -> None:
    """Raise UserError for a command, unless it may be run."""
    if path.startswith("pipe:") and not allow_pipe:
        raise UserError(
            f"shard {path}: would be run as a shell command; "
            "if you trust it say data.allow_pipe=true (index: --allow-pipe)"
        )


class RemoteFile:
    """Reads on, once, whatever happens in between. `heard`: time.monotonic() from which the first bytes are waited for
    (None: the read)."""

    def __init__(self, url: str, size: int | None, timeout: float, heard: float | None = None):
        self.url, self.size, self.timeout, self.at = url, size, timeout, 0
        self.heard = heard
        self.file: BinaryIO | Command | None = None
        self.rest: bytes | memoryview = b""
        self.ranges = True  # until the server turns out not to know them

    def read(self, count: int) -> bytes:
        """The next `count` bytes, fewer only at the end. Raises UserError."""
        parts: list[bytes | memoryview] = []
        left = count
        while left and (self.rest or self.fill()):
            parts.append(self.rest[:left])
            self.rest, left = self.rest[left:], left - len(parts[-1])
        return b"".join(parts)

    def fill(self) -> bool:
        """Get the next bytes; False at the end."""
        if self.size is not None and self.at >= self.size:
            return False
        self.file, data = persist(self.url, self.get, self.timeout, self.heard, self.drop)
        self.heard, self.at, self.rest = None, self.at + len(data), memoryview(data)
        return bool(data)

    def get(self) -> tuple[BinaryIO | Command, bytes]:
        """(open file, bytes from `at` on); changes nothing, for a call that hung may come back late."""
        file = self.file or open_at(self.url, self.at, self.ranges)
        data = file.read(CHUNK)
        if not data and self.size is not None:
            raise OSError(f"it ends after {self.at} of {self.size} bytes")
        return file, data

    def drop(self, error: Exception) -> None:
        self.file, self.ranges = None, self.ranges and not isinstance(error, ValueError)

    def __enter__(self) -> RemoteFile:
        return self

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            self.file.close()


def open_at(url: str, offset: int, ranges: bool) -> BinaryIO | Command:
    """A binary file that starts at `offset`. ranges: by a range request, if the server takes them."""
    if url.startswith("pipe:"):
        file: BinaryIO | Command = Command(url[len("pipe:") :])
    else:
        system, path = connect(url)
        # One request for all over http, where a server may not know ranges; else a request a chunk.
        whole = url.startswith("http") and not (offset and ranges)
        file = system.open(path, "rb", cache_type="none", block_size=0 if whole else CHUNK)
    if offset:
        try:
            file.seek(offset)  # type: ignore[union-attr]  # a command has none, which is caught
        except (ValueError, OSError, AttributeError):  # a server, or a command, that only begins at the begin
            while offset:
                skipped = len(file.read(min(offset, CHUNK)))
                if not skipped:
                    raise OSError("it has become shorter") from None
                offset -= skipped
    return file


def connect(url: str) -> tuple[AbstractFileSystem, str]:
    """(fsspec file system, path in it). Raises UserError for a URL that nothing here can open."""
    import aiohttp  # they take a while, and local shards need none
    import fsspec

    # aiohttp would end every transfer after five minutes; how long to wait is decided here.
    options = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None)}} if url.startswith("http") else {}
    try:
        return fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"shard {url}: cannot be opened ({error}); install what is named there, or mend the URL"
        ) from None


class Command:
    """What a shell command writes. A command that fails is an OSError at its end."""

    def __init__(self, command: str):
        self.process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE)

    def read(self, count: int) -> bytes:
        data = self.process.stdout.read(count)
        if not data and self.process.wait():
            raise OSError(f"the command ends with {self.process.returncode}")
        return data

    def close(self) -> None:
        self.process.kill()
        self.process.stdout.close()
        self.process.wait()
