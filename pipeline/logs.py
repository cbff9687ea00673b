"""Logging by the standard library: lines on stderr, and a file for each rank in a run's directory.

Modules log to `logging.getLogger(__name__)`. A program calls `set_up` once. Of other packages the warnings are logged.
"""

import logging
import os
import socket
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path

from tqdm import tqdm

from shards.errors import UserError

VARIABLE = "SAFECLIP_LOG_LEVEL"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
PACKAGES = ("pipeline", "shards")
MAX_BYTES, OLDER = 10 << 20, 2  # size of a rank's file, and how many full ones are kept as rank_N.log.1, ...

_handlers: dict[str, logging.Handler] = {}  # those of this module, by kind


def set_up(level: str | None = None) -> None:
    """Log to stderr: rank 0 from `level` on, other ranks warnings and errors only. A second call replaces the first.

    level: one of LEVELS; the default is SAFECLIP_LOG_LEVEL, and without it INFO. Raises UserError for another level.
    """
    name = (level or os.environ.get(VARIABLE) or "INFO").upper()
    if name not in LEVELS:
        raise UserError(f"log level (--log-level or {VARIABLE}): got {name!r}, expected one of {', '.join(LEVELS)}")
    for package in PACKAGES:
        logging.getLogger(package).setLevel(name)
    console = Console(name)
    if rank():
        console.setLevel(max(console.level, logging.WARNING))
    console.setFormatter(Line(origin() if rank() else ""))
    replace("console", console)


def open_file(folder: Path) -> None:
    """Log to FOLDER/rank_N.log too, until `close_file`. Lines are appended; a file of MAX_BYTES is rotated."""
    for package in map(logging.getLogger, PACKAGES):
        if package.level == logging.NOTSET:
            package.setLevel(logging.INFO)
    folder.mkdir(parents=True, exist_ok=True)
    file = RotatingFileHandler(folder / f"rank_{rank()}.log", maxBytes=MAX_BYTES, backupCount=OLDER, encoding="utf-8")
    file.setFormatter(Line(origin()))
    replace("file", file)


def close_file(error: BaseException | None = None) -> None:
    """Close the file of `open_file`. `error` is written to it before, with its traceback."""
    if error and "file" in _handlers:
        raised = (type(error), error, error.__traceback__)
        values = {"levelno": logging.ERROR, "levelname": "ERROR", "msg": "the process fails", "exc_info": raised}
        _handlers["file"].handle(logging.makeLogRecord(values))
    replace("file", None)


def replace(kind: str, handler: logging.Handler | None) -> None:
    """Make `handler` the only one of this kind."""
    if old := _handlers.pop(kind, None):
        logging.getLogger().removeHandler(old)
        old.close()
    if handler:
        logging.getLogger().addHandler(handler)
        _handlers[kind] = handler


def rank() -> int:
    """Rank of this process by the launcher's variables, which are there before the process group is."""
    given = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return int(given) if given.isdecimal() else 0  # the process group refuses what is no number


def origin() -> str:
    return f"rank {rank()} {socket.gethostname()}: "


class Line(logging.Formatter):
    """Time, level unless it is INFO, `origin` and message."""

    def __init__(self, origin: str):
        super().__init__(f"%(asctime)s %(level)s{origin}%(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.level = "" if record.levelno == logging.INFO else f"{record.levelname} "
        return super().formatMessage(record)


class Console(logging.Handler):
    """Writes to stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(f"{self.format(record)}\n", file=sys.stderr, end="")
        except Exception:
            self.handleError(record)
