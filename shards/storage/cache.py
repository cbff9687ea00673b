"""Whole shards from behind URLs in a bounded local folder, which all processes of a host share. No server, no state but
the files.

FOLDER/FINGERPRINT.tar     a whole shard; its time of change is when it was last opened
FOLDER/FINGERPRINT.part    one that is being fetched, at its full size from the beginning
FOLDER/lock                held while room is made

All agreement is by flock on these files, which the system lets go of when its holder dies (kill -9 too): who fetches
holds the part, who reads holds the shard, and what nobody holds may be removed, the least recently opened first.
"""

import contextlib
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from shards.errors import Unreachable, UserError
from shards.storage import remote
from shards.storage.protocols import StoredShard

POLL = 0.05  # seconds between looks at a shard that another process fetches


class Cache:
    """A folder of at most `limit` bytes, but for what is open at the moment. Cheap to send to worker processes."""

    def __init__(
        self, folder: str | Path, limit: int, timeout: float = remote.TIMEOUT, allow_pipe: bool = False, ranks: int = 1
    ):
        """`ranks`: how many of this host share the folder. Raises UserError where it cannot be used."""
        self.folder, self.limit, self.timeout, self.allow_pipe = Path(folder), limit, timeout, allow_pipe
        self.ahead = limit // (
            4 * ranks
        )  # bytes to fetch ahead: what is in use, and was, shall not be driven out by it
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self.turn():  # a disk without locks is told now
                os.utime(self.folder / "lock")
        except OSError as error:
            raise UserError(f"data.cache: {folder} cannot be used ({error.strerror}); name another folder") from None
        if os.stat(self.folder).st_uid != os.getuid():  # what is in it would be read as it is
            raise UserError(f"data.cache: {folder} belongs to somebody else; name a folder of your own")

    def open(self, shard: StoredShard, over_limit: bool = True) -> int | None:
        """A descriptor of the whole local copy of the shard, fetched if it is not there. It stays while it is open.

        Returns None where there is no room and it may not go `over_limit`, which it does only when all other copies are
        open. Raises UserError: the server is lost, or holds something else than was indexed.
        """
        whole, part = self.folder / f"{shard.fingerprint}.tar", self.folder / f"{shard.fingerprint}.part"
        heard = time.monotonic()
        while True:
            descriptor = open_whole(whole)
            if descriptor is not None:
                return descriptor
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o600)
            if not lock(descriptor, fcntl.LOCK_EX) or not is_same(descriptor, part):
                # Another process fetches it. As long as it gets on, bytes come into the file.
                found = os.fstat(descriptor)
                os.close(descriptor)
                if found.st_blocks:
                    heard = max(heard, time.monotonic() - (time.time() - found.st_mtime))
                if time.monotonic() - heard > self.timeout:
                    raise Unreachable(
                        f"shard {shard.path}: nothing came for {self.timeout:g} s; start again when it can be reached"
                    )
                time.sleep(POLL)
                continue
            try:
                if whole.exists() or not self.make_room(descriptor, shard.size, over_limit):
                    part.unlink()
                    os.close(descriptor)
                    if not whole.exists():
                        return None
                    continue
                self.fetch(descriptor, shard, heard)
                with self.turn():
                    os.replace(part, whole)
            except BaseException as error:
                part.unlink(missing_ok=True)
                os.close(descriptor)
                if isinstance(error, OSError):  # of this disk: what the server does wrong is another error
                    raise UserError(
                        f"data.cache: {self.folder}: {error.strerror}; "
                        "free some room, lower data.cache_gb, or name another folder"
                    ) from None
                raise
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            return descriptor

    def prefetch(self, shard: StoredShard) -> None:
        """Fetch the shard if it is not there and there is room. Raises UserError, as `open`."""
        descriptor = self.open(shard, over_limit=False)
        if descriptor is not None:
            os.close(descriptor)

    def drop(self, shard: StoredShard, descriptor: int) -> None:
        """The copy behind `descriptor` is damaged: remove it, unless another process has and fetched a new one."""
        whole = self.folder / f"{shard.fingerprint}.tar"
        with self.turn():
            if is_same(descriptor, whole):
                whole.unlink()

    def make_room(self, descriptor: int, size: int, over_limit: bool) -> bool:
        """Set the part behind `descriptor` to `size`, having removed what must go; False where it does not fit."""
        with self.turn():
            mine, copies, total = os.fstat(descriptor).st_ino, [], size
            for entry in os.scandir(self.folder):
                try:
                    found = entry.stat()
                except FileNotFoundError:  # a fetch that failed just now
                    continue
                if entry.name.endswith(".part") and found.st_ino != mine and remove(entry.path):
                    continue  # its process is dead
                if entry.name.endswith((".tar", ".part")) and found.st_ino != mine:
                    total += found.st_size
                    copies.append((found.st_mtime_ns, found.st_size, entry.path))
            for _, freed, path in sorted(copies):
                if total <= self.limit:
                    break
                if path.endswith(".tar") and remove(path):
                    total -= freed
            if total > self.limit and not over_limit:
                return False
            os.ftruncate(descriptor, size)
            return True

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Only one process of the host at a time is in the block."""
        with open(self.folder / "lock", "a") as file:  # who tidies /tmp may have removed it
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def fetch(self, descriptor: int, shard: StoredShard, heard: float | None) -> None:
        """Write the shard to the file behind `descriptor`; what comes is compared with its fingerprint. Raises
        UserError."""
        remote.refuse_pipe(shard.path, self.allow_pipe)
        for _ in range(2):  # a transfer may be damaged; twice in a row it is the shard
            digest, at = hashlib.blake2b(digest_size=16), 0
            size = None if shard.path.startswith("pipe:") else shard.size
            with remote.RemoteFile(shard.path, size, self.timeout, heard=heard) as file:
                while at <= shard.size and (data := file.read(min(1 << 20, shard.size + 1 - at))):
                    digest.update(data)
                    os.pwrite(descriptor, data[: shard.size - at], at)
                    at += len(data)
            if digest.hexdigest() == shard.fingerprint:
                os.fsync(descriptor)
                return
            heard = None
        raise UserError(
            f"shard {shard.path}: holds other bytes than those that were indexed (fingerprint {shard.fingerprint}); "
            "bring them back, or index the shards again"
        )


def open_whole(path: str | Path) -> int | None:
    """Descriptor of a whole copy, which is marked as used and stays while it is open; None where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if not is_same(descriptor, path):  # it was removed meanwhile
        os.close(descriptor)
        return None
    os.utime(descriptor)
    return descriptor


def remove(path: str | Path) -> bool:
    """Whether the file was removed: not if any process has it open (or it is gone)."""
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDWR)  # NFS locks for one alone only what may be written
        try:
            if lock(descriptor, fcntl.LOCK_EX):
                os.unlink(path)
                return True
        finally:
            os.close(descriptor)
    return False


def lock(descriptor: int, kind: int) -> bool:
    """Whether the lock was to be had at once."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def is_same(descriptor: int, path: str | Path) -> bool:
    """Whether the open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def default_folder() -> Path:
    """Where copies are kept unless the config names a folder."""
    return Path(tempfile.gettempdir()) / f"safeclip_cache_{os.getuid()}"
