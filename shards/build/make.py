"""Rows of pictures and captions -> shards. A shard is complete or absent, so an interrupted command resumes when it is
given again. Several processes may share the shards (shards.shares).

A row that cannot be used is a line of DIR/NNNNN.bad.jsonl beside the shard that it would be in, and no other row is
lost. Keys are row numbers, so that no name of a file has to be one; the file's path stands in the sample's .json
member.
"""

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import webdataset

from shards.errors import BadSample, UserError
from shards.progress import progress
from shards.samples.decode import decode_caption, name_format
from shards.shares import Parts, Share, in_order, processes
from shards.storage.files import claim_folder, remove_leftovers, whole_file, write_bytes

MARK, BAD = "made_by.json", ".bad.jsonl"
MAX_BYTES = 20_000_000  # of a file; a list may name one of any size
Caption = str | Path | tuple[str, int]  # a text, the file that holds it, or a class's name and number
Row = tuple[int, str | None, Caption | None, str | None]  # number of the line, path, caption, what is wrong or None


def make_shards(
    rows: Iterable[Row],
    out: str | Path,
    settings: dict,
    share: Share = Share(),
    workers: int | None = None,
    hidden: int = 0,
) -> str | None:
    """Write the shards of this share that are not in `out` yet; returns what was made of all rows as a line, or None
    where another process concludes.

    settings: what the shards are made of; "per_shard": rows of each. hidden: files and folders that were left out.
    """
    out, per_shard = Path(out), settings["per_shard"]
    if per_shard < 1:
        raise UserError(f"--per-shard: got {per_shard}, expected 1 or more")
    if claim_folder(out / MARK, settings, left=BAD) != settings:
        raise UserError(
            f"--out {out}: holds other files, or shards of another list or with other settings; name another folder"
        )
    parts, workers = Parts(out, share, settings), workers or processes()
    names: list[str] = []

    def jobs() -> Iterator[tuple[list[Row], Path, int]]:
        left = iter(rows)
        while chunk := list(itertools.islice(left, per_shard)):
            number = len(names)
            names.append(f"{number:05d}.tar")
            if share.has(number):
                yield chunk, out / names[-1], number * per_shard

    with share.alone(), ProcessPoolExecutor(workers) as pool:
        made = in_order(pool, make_shard, jobs(), 2 * workers)
        counts = list(progress(made, None, "shards made", share.shown))
    found = parts.join(counts)
    if found is None:
        return None
    pairs, bad = (sum(counts) for counts in zip((0, 0), *itertools.chain.from_iterable(found)))
    tidy(out, names)
    if not pairs:
        with share.alone():
            raise UserError(f"{settings.get('file') or settings['folder']}: {nothing_made(out, bad)}")
    text = f"{out}: {pairs:,} pairs in {len(names)} shards"
    if bad:
        text += f"; {bad:,} rows could not be used, {out}/*{BAD} lists them"
    if hidden:
        text += f"; {hidden:,} hidden files or folders were left out"
    return text + f"; next: safeclip index '{out}/{{00000..{max(0, len(names) - 1):05d}}}.tar' --out {out}/index"


def tidy(out: Path, names: list[str]) -> None:
    """Remove what killed processes, and an earlier list of which nothing could be used, have left beside the shards."""
    beside = {Path(name).stem + BAD for name in names}
    remove_leftovers([out / MARK, *(out / name for name in (*names, *beside))])
    for path in out.glob(f"*{BAD}"):
        if path.name not in beside:
            path.unlink(missing_ok=True)


def nothing_made(out: Path, bad: int) -> str:
    """Why no row could be used. The empty shards are removed, so that the command can be given again for another
    list."""
    for path in (*out.glob("*.tar"), out / MARK):
        path.unlink(missing_ok=True)
    if not bad:
        return "no rows in it; expected one for each pair below the header"
    with open(min(out.glob(f"*{BAD}"))) as lines:
        first = json.loads(next(lines))
    return (
        f"none of {bad:,} rows can be used, the first (line {first['line']}): {first['reason']}; "
        f"{out}/*{BAD} lists them; mend the list, or name the folder of the paths with --root"
    )


def make_shard(rows: list[Row], target: Path, first: int) -> tuple[int, int]:
    """(pairs, bad rows) of one shard, which is written unless it is there. `first`: number of its first row."""
    beside = target.with_name(target.stem + BAD)
    if not target.exists():
        bad = []
        with whole_file(target) as file, webdataset.TarWriter(file, user="data", group="data", mtime=0) as writer:
            for number, (line, path, caption, wrong) in enumerate(rows, first):
                try:
                    writer.write({"__key__": f"{number:09d}", **sample(path, caption, wrong)})
                except BadSample as error:
                    bad.append({"line": line, "path": path, "reason": str(error)})
            if bad:
                write_bytes(beside, "".join(json.dumps(row) + "\n" for row in bad).encode())
            else:
                beside.unlink(missing_ok=True)  # of a list of which nothing could be used
    lost = len(beside.read_bytes().splitlines()) if beside.exists() else 0
    return len(rows) - lost, lost


def sample(path: str, caption: Caption | None, wrong: str | None) -> dict[str, bytes]:
    """{extension: bytes} of one row. Raises BadSample."""
    if wrong:
        raise BadSample(wrong)
    number: int | None = None
    try:
        if isinstance(caption, tuple):
            caption, number = caption
        elif isinstance(caption, Path):
            caption = decode_caption(read_file(caption))
        text = decode_caption(caption.encode("utf-8", "surrogateescape")).encode()
        picture = read_file(path)
    except OSError as error:
        raise BadSample(f"{error.filename}: {error.strerror}") from None
    members = {kind_of(picture): picture, "txt": text, "json": json.dumps({"path": path}).encode()}
    return members if number is None else {**members, "cls": str(number).encode()}


def read_file(path: str | Path) -> bytes:
    """The content of a regular file that is not too large. Raises BadSample, OSError."""
    if "://" in str(path):
        raise BadSample("a URL; fetch pictures with img2dataset and index its shards")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe that somebody has named shall not be waited for
    with open(descriptor, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise BadSample(f"{path}: more than {MAX_BYTES} bytes")
    return data


def kind_of(picture: bytes) -> str:
    """The extension of a picture, by its first bytes. Raises BadSample: a list may name any file of this machine."""
    if picture[:3] == b"\xff\xd8\xff":
        return "jpg"
    if picture[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if picture[:4] == b"RIFF" and picture[8:12] == b"WEBP":
        return "webp"
    raise BadSample(f"no JPEG, PNG or WebP picture: the file is {name_format(picture)}")
