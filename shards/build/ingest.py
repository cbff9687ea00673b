"""Lists and folders of pictures -> shards. A shard is complete or absent, so an interrupted command resumes when it is
given again.

A row that cannot be used is a line of DIR/NNNNN.bad.jsonl beside the shard that it would be in, and no other row is
lost. Keys are row numbers, so that no name of a file has to be one; the file's path stands in the sample's .json
member.
"""

import csv
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import webdataset

from shards.errors import BadSample, UserError
from shards.index.tar import key_text
from shards.order.safe_mask import fingerprint
from shards.samples.decode import decode_caption, name_format
from shards.storage.files import whole_file, write_bytes, write_json

PATHS, CAPTIONS = ("path", "filepath", "image"), ("caption", "title")
MAX_LINES = 64  # of one row: a quote that does not close must not swallow the rest of the file
MAX_BYTES = 20_000_000  # of a file; a list may name one of any size
PICTURE_NAMES = (".jpg", ".jpeg", ".png", ".webp")
Caption = str | Path | tuple[str, int]  # a text, the file that holds it, or a class's name and number
Row = tuple[int, str | None, Caption | None, str | None]  # number of the line, path, caption, what is wrong or None


def from_csv(
    file: str | Path,
    out: str | Path,
    root: str | None = None,
    path: str | None = None,
    caption: str | None = None,
    separator: str | None = None,
    per_shard: int = 10_000,
    workers: int | None = None,
) -> str:
    """Shards in `out` of the rows of a CSV or TSV file with a header; returns what was made, as a line.

    `root`: folder that the paths are relative to (default: the file's). `path`, `caption`: names of the columns, by
    default those of the published SafeCLIP lists (path, caption) or of open_clip's (filepath, title). Raises UserError.
    """
    file = Path(file)
    if separator and (len(separator) > 1 or separator in '"\r\n'):
        raise UserError(f"--separator: got {separator!r}, expected one character, such as ';' or $'\\t' for a TAB")
    try:
        rows = read_rows(file, path, caption, separator)
        header = next(rows)
    except OSError as error:
        raise UserError(f"file {file}: {error.strerror or error}; give the path of a CSV file") from None
    settings = {
        "file": file.name,
        "content": fingerprint(file),
        "columns": header,
        "root": str(root or ""),
        "per_shard": per_shard,
    }
    root = os.path.abspath(root or file.parent)
    located = ((line, name and os.path.join(root, name), text, wrong) for line, name, text, wrong in rows)
    return make_shards(located, out, settings, workers)


def from_folder(
    folder: str | Path, out: str | Path, classes: bool = False, per_shard: int = 10_000, workers: int | None = None
) -> str:
    """Shards in `out` of the pictures in `folder` and below, in the order of their paths; returns what was made, as a
    line.

    The caption is in KEY.txt beside KEY.jpg. With `classes` it is the name of the folder below `folder` that the
    picture is in, whose number is the sample's .cls member; OUT/classnames.txt has the names (bytes that are not UTF-8
    as in keys). Links are followed. Hidden files and folders are left out. Raises UserError.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise UserError(f"folder {folder}: missing; name a folder of pictures")
    names, hidden = pictures_below(folder)
    below = sorted({name.partition(os.sep)[0] for name in names if os.sep in name})
    if not names or classes and not below:
        raise UserError(
            f"folder {folder}: no {'folder of ' if classes else ''}pictures ({', '.join(PICTURE_NAMES)}) in it"
        )
    if not classes and not any((folder / name).with_suffix(".txt").exists() for name in names):
        raise UserError(f"folder {folder}: no KEY.txt beside any picture; write captions there, or say --classes")
    number = {name: place for place, name in enumerate(below)}
    said = [key_text(name.replace("_", " ")) for name in below]

    def rows() -> Iterator[Row]:
        for line, name in enumerate(names, 1):
            top, slash, _ = name.partition(os.sep)
            if not classes:
                yield line, str(folder / name), (folder / name).with_suffix(".txt"), None
            elif slash:
                yield line, str(folder / name), (said[number[top]], number[top]), None
            else:
                yield line, str(folder / name), None, "picture in no class's folder"

    listing = hashlib.blake2b("\n".join(names).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    settings = {"folder": str(folder), "content": listing, "classes": classes, "per_shard": per_shard}
    made = make_shards(rows(), out, settings, workers, hidden)
    if classes:
        write_bytes(Path(out) / "classnames.txt", ("\n".join(said) + "\n").encode())
    return made


def pictures_below(folder: Path) -> tuple[list[str], int]:
    """(paths of the pictures below `folder`, relative to it, in order; number of hidden files and folders). Links are
    followed, but for those to a folder above them. Raises UserError."""

    def fail(error: OSError) -> None:
        raise UserError(f"folder {error.filename}: {error.strerror}; make it readable, or move it away")

    names, hidden = [], 0
    above = {str(folder): {os.path.realpath(folder)}}  # by folder: the real paths of itself and those above it
    for place, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        files = [name for name in files if name.lower().endswith(PICTURE_NAMES)]
        hidden += sum(is_hidden(name) for name in folders + files)
        names += [os.path.relpath(os.path.join(place, name), folder) for name in files if not is_hidden(name)]
        seen = above.pop(place)
        below = {name: os.path.realpath(os.path.join(place, name)) for name in folders if not is_hidden(name)}
        folders[:] = [name for name, real in below.items() if real not in seen]
        above |= {os.path.join(place, name): seen | {below[name]} for name in folders}
    return sorted(names), hidden


def is_hidden(name: str) -> bool:
    """Whether a file or folder was put there by a program, not by a person."""
    return name.startswith(".") or name == "__MACOSX"


def make_shards(
    rows: Iterable[Row], out: str | Path, settings: dict, workers: int | None = None, hidden: int = 0
) -> str:
    """Write the shards that are not in `out` yet; returns what was made, as a line. `hidden`: files and folders that
    were left out."""
    out, per_shard = Path(out), settings["per_shard"]
    if per_shard < 1:
        raise UserError(f"--per-shard: got {per_shard}, expected 1 or more")
    claim(out, settings)
    rows, workers = iter(rows), workers or os.cpu_count()
    with ProcessPoolExecutor(workers) as pool:
        running: set[Future[tuple[int, int]]] = set()
        done: list[tuple[int, int]] = []
        shards = 0
        while chunk := list(itertools.islice(rows, per_shard)):
            running.add(pool.submit(make_shard, chunk, out / f"{shards:05d}.tar", shards * per_shard))
            shards += 1
            if len(running) > 2 * workers:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                done += [future.result() for future in finished]
        done += [future.result() for future in running]
    pairs, bad = (sum(counts) for counts in zip(*done)) if done else (0, 0)
    if not pairs:
        raise UserError(f"{settings.get('file') or settings['folder']}: {nothing_made(out, bad)}")
    text = f"{out}: {pairs:,} pairs in {shards} shards"
    if bad:
        text += f"; {bad:,} rows could not be used, {out}/*.bad.jsonl lists them"
    if hidden:
        text += f"; {hidden:,} hidden files or folders were left out"
    return text + f"; next: safeclip index '{out}/{{00000..{max(0, shards - 1):05d}}}.tar' --out {out}/index"


def nothing_made(out: Path, bad: int) -> str:
    """Why no row could be used. The empty shards are removed, so that the command can be given again."""
    for path in out.glob("*.tar"):
        path.unlink()
    if not bad:
        return "no rows in it; expected one for each pair below the header"
    with open(min(out.glob("*.bad.jsonl"))) as lines:
        first = json.loads(next(lines))
    return (
        f"none of {bad:,} rows can be used, the first (line {first['line']}): {first['reason']}; "
        f"{out}/*.bad.jsonl lists them; mend the list, or name the folder of the paths with --root"
    )


def claim(out: Path, settings: dict) -> None:
    """Note in OUT what its shards are made of. Raises UserError when it is in use for something else."""
    mark = out / "made_by.json"
    try:
        there = json.loads(mark.read_text())
    except (OSError, ValueError):
        there = None if out.exists() and (not out.is_dir() or any(out.iterdir())) else settings
    else:
        if not any(out.glob("*.tar")):  # nothing could be made of the list that it was for
            there = settings
            for path in out.glob("*.bad.jsonl"):
                path.unlink()
    if there != settings:
        raise UserError(
            f"--out {out}: holds other files, or shards of another list or with other settings; name another folder"
        )
    write_json(mark, settings)


def make_shard(rows: list[Row], target: Path, first: int) -> tuple[int, int]:
    """(pairs, bad rows) of one shard, which is written unless it is there. `first`: number of its first row."""
    beside = target.with_suffix(".bad.jsonl")
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


def read_rows(
    file: str | Path, path: str | None = None, caption: str | None = None, separator: str | None = None
) -> Iterator[list | tuple]:
    """Yield the header's [path, caption, separator], then (line, path, caption, what is wrong or None) of each row.
    Raises UserError."""
    with open(file, "rb") as lines:
        records = read_records(lines, separator)
        _, header, separator = next(records, (1, [], separator))
        if header is None:
            raise UserError(f"file {file}: the header is not UTF-8 text ({first_bytes(file)}); save the list as UTF-8")
        header = [name.strip() for name in header]
        places = []
        for option, wanted, known in (("--path", path, PATHS), ("--caption", caption, CAPTIONS)):
            name = wanted or next((name for name in known if name in header), None)
            if name not in header:
                raise UserError(
                    f"file {file}: no column {wanted or ' or '.join(known)} in the header {header}; "
                    f"name it with {option}, and what is between the columns with --separator"
                )
            places.append(header.index(name))
        yield [header[place] for place in places] + [separator]
        for line, fields, _ in records:
            if fields is None or len(fields) != len(header):
                wrong = "not UTF-8" if fields is None else f"{len(fields)} columns, the header has {len(header)}"
                yield line, None, None, wrong
            else:
                yield line, fields[places[0]], fields[places[1]], None


def first_bytes(file: str | Path) -> str:
    """What a file that is no UTF-8 text begins with."""
    with open(file, "rb") as opened:
        data = opened.read(2)
    known = {b"\x1f\x8b": "gzip", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"PK": "a zip file or a workbook"}
    return f"it is {known[data]}" if data in known else f"it begins with {data!r}"


def read_records(
    lines: Iterable[bytes], separator: str | None = None
) -> Iterator[tuple[int, list[str] | None, str | None]]:
    """Yield (number of the line from 1, fields or None where it is not UTF-8, separator) of each record of a CSV file
    (RFC 4180).

    A quote that does not close, or that closes within a field, is no quote: the line is read as it stands. So no row
    can swallow others.
    """
    ahead: list[bytes] = []
    number, columns = 0, None
    lines = iter(lines)
    while line := ahead.pop(0) if ahead else next(lines, b""):
        number += 1
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            yield number, None, separator
            continue
        if not text.strip("\r\n"):
            continue
        separator = separator or ("\t" if "\t" in text else ",")
        fields, used = parse(text, separator), 0
        while fields is None and used < MAX_LINES:
            if used == len(ahead):
                ahead += itertools.islice(lines, 1)
            if used == len(ahead):
                break
            used += 1
            fields = parse(text + b"".join(ahead[:used]).decode("utf-8", "replace"), separator)
        if not fields or columns and len(fields) != columns:
            used, fields = 0, text.rstrip("\r\n").split(separator)
        columns = columns or len(fields)
        yield number, fields, separator
        del ahead[:used]
        number += used


def parse(text: str, separator: str) -> list[str] | None:
    """The fields; None where a quote is still open; [] where one closes within a field."""
    try:
        return next(csv.reader([text], delimiter=separator, strict=True))
    except csv.Error as error:
        return None if "unexpected end" in str(error) else []
