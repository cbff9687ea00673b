"""The rows of a list of pictures and captions, a CSV or TSV file. No row can swallow others."""

import csv
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from shards.errors import UserError

PATHS, CAPTIONS = ("path", "filepath", "image"), ("caption", "title")
MAX_LINES = 64  # of one row: a quote that does not close must not swallow the rest of the file


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
