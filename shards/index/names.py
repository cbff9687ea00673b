"""The shards that a person names: paths and URLs, with braces, wildcards, and lists of them."""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from shards.errors import UserError
from shards.storage.paths import braces
from shards.storage.paths import expanded as without_variables
from shards.storage.remote import is_remote

WORD = re.compile(r"[a-z0-9]+")  # of fsspec's chained URLs: simplecache::s3://...


def named(patterns: Iterable[str | Path]) -> list[str]:
    """The paths and URLs that `patterns` name, in order. Raises UserError.

    A pattern is a path or URL with braces and wildcards, several of them joined by `::`, or a list of patterns, one a
    line: `@FILE` or FILE.txt. There ~ and $NAME are replaced; empty lines and lines that begin with # are left out.
    """
    return [path for pattern in patterns for path in expanded(str(pattern))]


def expanded(pattern: str) -> Iterator[str]:
    if pattern.startswith("pipe:"):
        yield from braces(pattern)
        return
    for part in joined(pattern):
        for path in braces(part):
            if path.startswith("@") or path.endswith(".txt") and not is_remote(path):
                for line in lines(path.removeprefix("@")):
                    yield from expanded(line)
            else:
                yield from wildcards(path)


def joined(pattern: str) -> list[str]:
    """The parts between `::`; a chained URL stays whole."""
    parts: list[str] = []
    for part in pattern.split("::"):
        if parts and WORD.fullmatch(parts[-1].rpartition("::")[2]):
            parts[-1] += f"::{part}"
        else:
            parts.append(part)
    return parts


def wildcards(path: str) -> list[str]:
    """The files that a local path with the wildcards *, ? and ** matches, in order. Brackets are none."""
    if is_remote(path) or not re.search("[*?]", path) or os.path.exists(path):
        return [path]
    found = sorted(glob.glob(path.replace("[", "[[]"), recursive=True))
    if not found:
        raise UserError(f"shard {path}: matches no file; check the path")
    return found


def lines(path: str) -> list[str]:
    """The patterns in a list."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"list {path}: {what}; expected a text file with a shard a line") from None
    found = [line.strip() for line in text.splitlines()]
    found = [line for line in found if line and not line.startswith("#")]
    nested = next((line for line in found if line.startswith("@") or line.endswith(".txt")), None)
    if nested or not found:
        raise UserError(
            f"list {path}: {f'names a list, {nested}' if nested else 'names no shard'}; expected a shard a line"
        )
    try:
        return ["::".join(map(without_variables, joined(line))) for line in found]
    except UserError as error:
        raise UserError(f"list {path}: {error}") from None
