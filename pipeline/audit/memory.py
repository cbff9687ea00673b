"""What an audit needs of a host's memory, and what there is of it: arrays of a few numbers a pair, and blocks of
embeddings."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.audit.data import AuditData
from pipeline.audit.detectors import REGISTRY
from pipeline.audit.detectors.repeated import SUMS
from shards.errors import UserError

PROGRAM = 1_000_000_000  # libraries, the report's pictures and what it shows
BLOCK_NUMBER, SAMPLE_NUMBER = 16 << 16, 16  # bytes for each number of an embedding: in a block, in a picture sampled
SCORES, FINDING, HISTORY, QUALITY = 16, 5, 8, 400  # bytes a pair: read, of each detector, and what some hold besides
WORK, WORK_EMBEDDINGS = 40, 80  # bytes a pair for a while: orders and ranks; hashes, groups and factors
CGROUPS = Path("/sys/fs/cgroup")


def needed(pairs: int, width: int, names: Sequence[str], sample: int) -> int:
    """Bytes that an audit takes at most, as measured in tests/benchmarks/README.md. width: of the embeddings, 0 without
    any; names: of the detectors that run; sample: pictures that are searched for neighbours."""
    embedded = any({"images", "texts", "cells"} & set(REGISTRY[name].needs) for name in names)
    a_pair = SCORES + FINDING * (len(names) + 1) + (WORK_EMBEDDINGS if embedded else WORK)
    a_pair += HISTORY * ("history" in names) + QUALITY * any(REGISTRY[name].package for name in names)
    if not embedded:
        return PROGRAM + a_pair * pairs
    sums = 8 * min(SUMS, pairs * width)
    return PROGRAM + a_pair * pairs + sums + width * (BLOCK_NUMBER + SAMPLE_NUMBER * min(sample, pairs))


def available(root: Path = CGROUPS) -> int | None:
    """Bytes that this process may still take: what the host has available, or less where a control group (version 1 or
    2, its own or one above) leaves less. None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        found = [1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])]
    except (OSError, StopIteration):
        return None
    for _, controllers, path in groups:
        if not controllers:
            found += left_below(root, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            files = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            found += left_below(root / "memory", path, *files)
    return min(found)


def left_below(root: Path, path: str, most: str, used: str, cached: str) -> list[int]:
    """Bytes left in a control group and in those above it; none of a group without a limit. most, used: its files;
    cached: the line of memory.stat that says how much of it the kernel would give back."""
    found, folder = [], root / path.lstrip("/")
    for group in (folder, *folder.parents):
        if not group.is_relative_to(root):
            break
        try:
            limit, taken = (int((group / name).read_text()) for name in (most, used))
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such group here, or its limit is "max"
            continue
        found.append(max(0, limit - taken + int(stat.get(cached, 0))))
    return found


def require_memory(data: AuditData, names: Sequence[str]) -> None:
    """Raise UserError where an audit of `data` by the detectors `names`, as far as they can run, needs more memory than
    there is. Reads no scores."""
    absent = set() if data.images else {"images", "texts"}
    absent |= set() if data.cells else {"cells", "hash_N"}
    absent |= set() if data.rounds else {"rounds", "excluded"}
    running = [name for name in names if not absent & set(REGISTRY[name].needs)]
    width = data.images.width if data.images else 0
    need, there = needed(data.N, width, running, data.sample), available()
    if there is None or need <= there:
        return
    advice = [f"--detectors mismatch ({gigabytes(needed(data.N, 0, ['mismatch'], 0))})"]
    least = needed(data.N, width, running, 1024)
    if least < need:
        advice.insert(0, f"--sample 1024 ({gigabytes(least)})")
    what = f" with embeddings of width {width}" if width else ""
    raise UserError(
        f"audit {data.source}: {data.N:,} pairs{what} and {len(running)} detectors need about {gigabytes(need)} of "
        f"memory, {gigabytes(there)} are available; use a host with more, or {' or '.join(advice)}"
    )


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
