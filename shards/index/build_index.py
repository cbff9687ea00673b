"""Make an index of shards: one pass over each shard, shards in parallel, what is known of unchanged shards is kept."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

from shards.errors import UserError
from shards.index.findings import Finding, Findings
from shards.index.names import named
from shards.index.scan import scan_shard
from shards.index.shard_index import Shard, ShardIndex, write_index
from shards.index.tar import NO_TAR
from shards.index.tar_samples import PICTURES
from shards.progress import progress
from shards.shares import Parts, Share, in_order, processes
from shards.storage import remote
from shards.storage.cache import is_same
from shards.storage.captions import sources
from shards.storage.files import whole_file

logger = logging.getLogger(__name__)

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # as Lustre without `flock`, or NFS without its lock service
SHOWN = 3  # shards that a message names
MEMBERS = r"[a-z0-9][a-z0-9_.-]*(,[a-z0-9][a-z0-9_.-]*)*"  # names behind the key
# Names of tables, and of what killed processes have left of them; other files in their folder are the user's.
OWN_TABLE = re.compile(r"[0-9a-f]{32}\.parquet|\.[0-9a-f]{32}\.parquet\.[0-9a-f]+\.part")
KEPT = 24 * 60 * 60  # seconds that a table stays which no index names any more: who has the old one open reads it


@contextlib.contextmanager
def turn(out: Path) -> Iterator[None]:
    """Only one process at a time is in the block of the folder `out`; others wait."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / ".lock"
    while True:
        with open(path, "ab") as file:
            try:
                # Of this process alone: workers that outlive it do not hold the lock, as they would that of flock().
                fcntl.lockf(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                logger.warning(f"{out}: its disk has no locks ({error.strerror}); use it for one job at a time")
            if not is_same(file.fileno(), path):  # who held it has removed it
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def remove_old_tables(folder: Path, used: set[str], before: set[str]) -> None:
    """Remove the tables in `folder` that are not in `used` and that no index has named for a while. `before`: tables of
    the index that was just replaced."""
    for path in folder.iterdir():
        if not OWN_TABLE.fullmatch(path.name) or path.name in used:
            continue
        if path.name in before:
            os.utime(path)
        elif time.time() - path.stat().st_mtime > KEPT:
            path.unlink()


def build_index(
    paths: Sequence[str],
    out: str | Path,
    text: str = "txt",
    workers: int | None = None,
    report: str | Path | None = None,
    timeout: float = remote.TIMEOUT,
    allow_pipe: bool = False,
    image: str = "",
    share: Share = Share(),
) -> ShardIndex | None:
    """Index tars (`paths`: as shards.index.names; local ones or URLs) into the folder `out`; returns the
    ShardIndex.

    `text` is what a sample's text is: the extension of a member ("txt" for captions, "cls" for labels), or
    "json:FIELD", a field of its .json member (captions.json_texts); `image` what its picture is, "" for any of
    scan.PICTURES. Both may be names behind the key, joined by commas ("input.png,png"), of which the first that a
    sample has is read. Sources of text joined by + each give captions of the sample.

    One pass over each shard, shards in parallel; a shard that `out` holds already and that has not changed is not read
    again (scan.scan_shard). A sample without picture or text keeps its position. Raises UserError naming the first
    damaged shard; with `report`, a file, all that was found is listed there and what is intact is indexed.

    Another process that indexes into `out` is waited for, but for those that have another `share` of this job: they
    read their shards at the same time, and all but the last to finish return None.
    """
    if not str(out):
        raise UserError("--out: got an empty path, expected a folder for the index")
    if Path(out).exists() and not Path(out).is_dir():
        raise UserError(f"--out: {out} is a file, expected a folder for the index")
    check_members(text, image)
    urls, out = expand(paths), Path(out)
    scan = partial(scan_shard, text=text, image=image, tables=out / "tables", timeout=timeout, allow_pipe=allow_pipe)
    parts = Parts(out, share, urls, text, image)
    with share.alone(), contextlib.ExitStack() as stack:
        if share.world == 1:
            stack.enter_context(turn(out))
        found = parts.join(scan_all(scan, urls, share, workers or processes()))
        if found is None:
            return None
        if share.world > 1:  # tables are whole or absent, and may be written at the same time; the list of them not
            stack.enter_context(turn(out))
        scanned = [found[number % share.world][number // share.world] for number in range(len(urls))]
        findings = Findings(out / "tables", {entry["table"]: count for entry, count in scanned if count})
        shards = [Shard(**entry, text=text, image=image) for entry, _ in scanned]
        if report:
            with whole_file(report) as file:
                file.writelines(f"{json.dumps(asdict(finding))}\n".encode() for finding in findings)
        check_findings(shards, findings, paths, bool(report))
        return save_index(out, shards, findings)


def check_members(text: str, image: str) -> None:
    """Raise UserError unless `text` and `image` name members of samples."""
    if not all(re.fullmatch(f"{MEMBERS}|json:.+", part) for part in text.split("+")):
        raise UserError(
            f"--text: got {text!r}, expected names of members behind the key, in lower case and joined by commas "
            "(txt, cls, outputs.txt), or json:FIELD; several of these joined by + are captions of one picture"
        )
    of_text = {name for source in sources(text) for name in source.members}
    if not re.fullmatch(f"({MEMBERS})?", image) or of_text.intersection(image.split(",")):
        raise UserError(
            f"--image: got {image!r}, expected other names of members behind the key than those of --text, in lower "
            "case and joined by commas (input.png)"
        )


def scan_all(
    scan: Callable[[str], tuple[dict, list[Finding]]], urls: list[str], share: Share, workers: int
) -> list[tuple[dict, int]]:
    """What `scan` finds in the shards of this share: what the index says of each, and the number of findings."""
    own, scanned = share.of(urls), []
    workers = min(workers, len(own))
    with ProcessPoolExecutor(workers, initializer=ignore_signals) if workers > 1 else ThreadPoolExecutor(1) as pool:
        scans = in_order(pool, scan, ((url,) for url in own), 8 * workers)
        for entry, found in progress(scans, len(own), "shards indexed", share.shown):
            scanned.append((entry, len(found)))
    return scanned


def check_findings(shards: list[Shard], findings: Findings, paths: Sequence[str], reported: bool) -> None:
    """Raise UserError where a shard is damaged, unless that is reported, and where no sample can be used."""
    first = None if reported else next((finding for finding in findings if finding.damage), None)
    if first:
        more = sum(finding.damage for finding in findings) - 1
        others = f" (and {more} more of the kind)" if more else ""
        where, mend = f", at byte {first.byte}", "fetch or write it again, "
        if first.reason.startswith(NO_TAR):  # it says itself how to mend it
            where = mend = ""
        raise UserError(
            f"shard {first.shard}: {first.reason}{where}{others}; "
            f"{mend}leave it out, or let --report FILE list all damage and index what is intact"
        )
    unusable = sum(1 for _ in findings.by_sample())
    if sum(shard.samples for shard in shards) == unusable:
        text, image = shards[0].text, shards[0].image
        kinds = Counter(finding.kind for finding in findings.by_sample())
        kind, times = next(iter(kinds.most_common(1)), ("", 0))
        most = next((finding for finding in findings.by_sample() if finding.kind == kind), None)
        why = f" (most often, {times:,} times: sample {most.key!r}: {most.reason})" if most else ""
        picture = image or ",".join(PICTURES)
        caption = ",".join(dict.fromkeys(name for source in sources(text) for name in source.members))
        raise UserError(
            f"shards {' '.join(map(str, paths[:SHOWN]))}{' ...' if len(paths) > SHOWN else ''}: none of "
            f"{unusable:,} samples in them has both, a picture and a usable text{why}; expected "
            f"members KEY.({picture.replace(',', '|')}) and KEY.({caption.replace(',', '|')}), the key without a dot"
        )


def save_index(out: Path, shards: list[Shard], findings: Findings) -> ShardIndex:
    """The index of `shards`, written while nobody else writes to `out`."""
    before: set[str] = set()
    with contextlib.suppress(UserError):
        before = {Path(shard.table).name for shard in ShardIndex.load(out).shards}
    write_index(out, shards, shards[0].text, shards[0].image)
    remove_old_tables(out / "tables", {shard.table for shard in shards}, before)
    index = ShardIndex.load(out)
    index.findings = findings
    return index


def ignore_signals() -> None:
    """Initialize a reading process: signals to the command are handled by the process that has started it."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def expand(patterns: Iterable[str]) -> list[str]:
    """The absolute paths and URLs that `patterns` name. Raises UserError for one that is named twice."""
    urls = [path if remote.is_remote(path) else os.path.abspath(path) for path in named(patterns)]
    twice = next((url for url, times in Counter(urls).items() if times > 1), None)
    if twice:
        raise UserError(f"shard {twice}: named twice; name each shard once")
    return urls
