"""Lists and folders of pictures -> shards."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from shards.build.make import Row, make_shards
from shards.build.rows import read_rows
from shards.errors import UserError
from shards.index.tar import key_text
from shards.order.safe_mask import fingerprint
from shards.shares import Share
from shards.storage.files import write_bytes

PICTURE_NAMES = (".jpg", ".jpeg", ".png", ".webp")


def from_csv(
    file: str | Path,
    out: str | Path,
    root: str | None = None,
    path: str | None = None,
    caption: str | None = None,
    separator: str | None = None,
    per_shard: int = 10_000,
    workers: int | None = None,
    share: Share = Share(),
) -> str | None:
    """Shards in `out` of the rows of a CSV or TSV file with a header; returns what was made, as a line. Of several
    processes each makes its `share`, and all but the last to finish return None.

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
    return make_shards(located, out, settings, share, workers)


def from_folder(
    folder: str | Path,
    out: str | Path,
    classes: bool = False,
    per_shard: int = 10_000,
    workers: int | None = None,
    share: Share = Share(),
) -> str | None:
    """Shards in `out` of the pictures in `folder` and below, in the order of their paths; returns what was made, as
    `from_csv`.

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
    made = make_shards(rows(), out, settings, share, workers, hidden)
    if made and classes:
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
    return name.startswith(".") or name in ("__MACOSX", "@eaDir")
