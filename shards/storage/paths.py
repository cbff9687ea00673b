"""Paths as users write them."""

import os
import re

from braceexpand import braceexpand

from shards.errors import UserError
from shards.storage.remote import is_remote

VARIABLE = re.compile(r"\$(?:(\$)|([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


def expanded(path: str) -> str:
    """`path` with $NAME, ${NAME} and a leading ~ or ~USER replaced; `$$` is a dollar sign. A URL or a `pipe:` command
    stays as it is. Raises UserError that begins with "got" and names what is not set."""
    if is_remote(path):
        return path
    if "\0" in path:
        raise UserError(f"got {path!r}, expected a path without a zero byte")

    def value(found: re.Match) -> str:
        name = found[2] or found[3]
        if name and name not in os.environ:
            raise UserError(f"got {path!r}, but ${name} is not set; set it, or write $$ for a dollar sign")
        return os.environ[name] if name else "$"

    home = os.path.expanduser(path)
    if home == path and re.match(r"~[^/]*(/|$)", path):
        raise UserError(f"got {path!r}, but there is no user {path.partition('/')[0][1:]!r}; write ./~ for such a name")
    return VARIABLE.sub(value, home)


def braces(pattern: str) -> list[str]:
    """The paths that a brace-expanded pattern names. Raises UserError."""
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"path {pattern}: {error}; close the brace, or write \\{{ for one in a name") from None


def escaped(path: str) -> str:
    """The path that `expanded` turns into `path`."""
    return path if is_remote(path) else path.replace("$", "$$")
