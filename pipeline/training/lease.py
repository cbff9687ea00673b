"""Lease of a run directory: one run at a time writes it, also between hosts that share the disk.

RUN/lease.json says which process holds the directory; a thread of rank 0 renews the file's time every BEAT seconds. A
start that finds a lease
  of a process of this host: takes it over at once if that process is dead, and is refused if it lives;
  of another host: is refused when it sees the lease renewed, and takes it over when it was not renewed for STALE
  seconds, by the clock of the disk's server.
A holder that finds another's name in the file stops before it writes anything else.
"""

import atexit
import contextlib
import json
import logging
import os
import tempfile
import threading
import time
import uuid
from pathlib import Path

from pipeline.distributed import comm, hosts
from pipeline.distributed.heartbeat import before_exit
from shards.errors import UserError
from shards.storage.files import patiently, write_bytes

logger = logging.getLogger(__name__)

NAME = "lease.json"
BEAT = 10.0  # seconds between renewals
STALE = 60.0  # seconds without a renewal after which the holder is taken for dead
SETTLE = 0.5  # seconds in which another start may have taken over the same stale lease

Found = tuple[dict, float, float]  # holder, time of the last renewal, seconds since then by the disk's own clock


class Lease:
    """The lease of the run directory `folder`. lost: whether another process has taken it over."""

    def __init__(self, folder: Path):
        self.path, self.lost = folder / NAME, False
        self.seen: tuple[tuple, float] | None = None  # of another's lease (token, renewed), and time.monotonic()
        self.ended = threading.Event()
        self.mine = {
            "token": uuid.uuid4().hex,
            "host": hosts.host(),
            "machine": machine(),
            "pid": os.getpid(),
            "started": started(os.getpid()),
            "job": os.environ.get("SLURM_JOB_ID"),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }

    def acquire(self) -> None:
        """Take the lease. All ranks call, and wait for up to STALE seconds where its holder may be dead. Raises
        UserError on all while another run holds it."""
        while not comm.on_rank0(self.attempt):
            time.sleep(BEAT / 20)
        if comm.is_rank0():
            atexit.register(self.release)
            before_exit.add(self.release)
            threading.Thread(target=self.renew, daemon=True).start()

    def attempt(self) -> bool:
        """Whether the lease is taken; False where that cannot be told yet. Rank 0 calls. Raises UserError."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.create()
            except FileExistsError:
                return self.take_over()
        except OSError as error:
            raise UserError(
                f"run.dir: {self.path.parent} cannot be read or written ({error.strerror}); "
                "take another run.dir, or mend that"
            ) from None
        return True

    def create(self) -> None:
        """Raises FileExistsError where there is a lease."""
        with open(self.path, "xb") as file:
            file.write(json.dumps(self.mine).encode())

    def take_over(self) -> bool:
        """Whether the lease of another process, which has to be dead, is taken; False where that cannot be told yet."""
        found, now = look(self.path), time.monotonic()
        if found is None:  # released in this moment
            return False
        holder, renewed, age = found
        alive, seen = is_alive(holder), (holder.get("token"), renewed)
        if alive or alive is None and self.seen and self.seen[0] != seen:
            raise UserError(f"run.dir: {self.path.parent} {in_use(holder, age)}")
        if self.seen is None:
            self.seen = seen, now
            if alive is None and 2 * BEAT < age < STALE:
                text = f"its lease is taken over when it was not renewed for {STALE:.0f} s"
                logger.info(f"{self.path.parent}: {named(holder)} was last seen {age:.0f} s ago; {text}")
        if alive is None and max(age, now - self.seen[1]) < STALE:
            return False
        write_bytes(self.path, json.dumps(self.mine).encode())
        time.sleep(SETTLE)
        return self.is_mine()

    def is_mine(self) -> bool:
        found = look(self.path)
        return bool(found) and found[0].get("token") == self.mine["token"]

    def is_others(self, found: Found | None) -> bool:
        """Whether what was found names another process; one that is not written whole yet names nobody."""
        return found is not None and found[0].get("token") not in (None, self.mine["token"])

    def renew(self) -> None:
        """Thread: renew the lease until it is released or lost. A disk that does not answer is tried again."""
        renewed = time.monotonic()
        while not self.ended.wait(BEAT) and not self.lost:
            with contextlib.suppress(OSError):
                found = look(self.path)
                if self.is_others(found) or found is None and time.monotonic() - renewed >= STALE:
                    self.lost = True
                elif found is None:  # deleted by hand
                    self.create()
                else:
                    os.utime(self.path)
                renewed = time.monotonic()

    def check(self) -> None:
        """Raise UserError if another run has taken the lease over. Rank 0 calls, before it writes a checkpoint."""
        found = None
        with contextlib.suppress(OSError):  # not known now: `renew` goes on asking
            found = look(self.path)
        self.lost = self.lost or self.is_others(found)
        if self.lost:
            by = in_use(found[0], found[2]) if found else "was in use by another run"
            raise UserError(
                f"run.dir: {self.path.parent} {by}; this run had not renewed its lease for {STALE:.0f} s, and stops"
            )

    def release(self) -> None:
        """Let go of the lease, so that the next start need not wait."""
        self.ended.set()
        atexit.unregister(self.release)
        before_exit.discard(self.release)
        with contextlib.suppress(OSError):
            if self.is_mine():
                self.path.unlink()


def holder_of(folder: Path) -> str | None:
    """Who holds the run directory, in words; None where nobody does, or a process that is dead."""
    try:
        found = look(folder / NAME)
    except OSError as error:
        return f"holds a {NAME} that cannot be read ({error.strerror}); mend that, or take another run.dir"
    if not found or is_alive(found[0]) is False or is_alive(found[0]) is None and found[2] >= STALE:
        return None
    return in_use(found[0], found[2])


def look(path: Path) -> Found | None:
    """The lease at `path`; None where there is none. Raises OSError where that cannot be told."""

    def read() -> tuple[bytes, float]:
        with open(path, "rb") as file:  # opening it makes a network file system ask its server
            return file.read(), os.fstat(file.fileno()).st_mtime

    try:
        data, renewed = patiently(read)
    except FileNotFoundError:
        return None
    try:
        holder = json.loads(data)
    except ValueError:  # not written whole yet
        holder = {}
    try:
        with tempfile.NamedTemporaryFile(prefix=".clock_", dir=path.parent) as file:
            os.utime(file.name)
            now = os.stat(file.name).st_mtime
    except OSError:
        now = time.time()
    return holder if isinstance(holder, dict) else {}, renewed, now - renewed


def is_alive(holder: dict) -> bool | None:
    """Whether the holder lives; None where it is on another host, or in another container, and cannot be asked."""
    if holder.get("machine") != machine() or not machine():
        return None
    pid = holder.get("pid")
    # Its own: a run that ended in this process without letting go.
    return pid != os.getpid() and started(pid) is not None and started(pid) == holder.get("started")


def machine() -> str:
    """What tells this host's processes: its boot, and the namespace of its process numbers."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def started(pid: object) -> str | None:
    """When a process of this host started, in ticks since its boot; None for one that is dead."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def named(holder: dict) -> str:
    job = f" (SLURM job {holder['job']})" if holder.get("job") else ""
    return f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')}{job}"


def in_use(holder: dict, age: float) -> str:
    text = (
        f"is in use by {named(holder)} since {holder.get('since', '?')}, last seen {max(0.0, age):.0f} s ago; "
        "stop that run or wait for its end, or take another run.dir"
    )
    return text if is_alive(holder) else f"{text}. If it died, start again in {STALE:.0f} s"
