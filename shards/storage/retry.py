"""Requests to servers that fail and hang, tried again with back-off.

This is not tenacity: the limit counts from the last byte and some errors are final, so that wait, stop and retry would
all be functions of this module, and the code ten lines longer.
"""

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from shards.errors import Unreachable, UserError

Found = TypeVar("Found")

FIRST_WAIT, LONGEST_WAIT = 0.25, 15.0  # seconds between tries, doubled each time


def persist(
    url: str,
    function: Callable[[], Found],
    timeout: float,
    heard: float | None = None,
    failed: Callable[[Exception], None] = lambda error: None,
) -> Found:
    """function(), tried again with back-off, until `timeout` seconds have passed since `heard`. Each try may take half
    of them.

    Raises Unreachable, or UserError where trying again is of no use: no such file, not allowed.
    """
    heard, wait = time.monotonic() if heard is None else heard, FIRST_WAIT
    while True:
        left = heard + timeout - time.monotonic()
        try:
            return bounded(function, max(0.0, min(left, timeout / 2)))
        except UserError:
            raise
        except Exception as error:  # every backend has kinds of its own
            if is_final(error):
                reason = "missing" if isinstance(error, FileNotFoundError) else f"not allowed ({error})"
                raise UserError(f"shard {url}: {reason}; check the URL and the credentials") from None
            failed(error)
            pause = wait * random.uniform(0.5, 1.0)  # so that many readers do not come back together
            if time.monotonic() + pause > heard + timeout:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                raise Unreachable(
                    f"shard {url}: nothing came for {timeout:g} s ({reason}); "
                    "bring the server back and start again, or wait longer with data.remote_timeout"
                ) from None
            time.sleep(pause)
            wait = min(2 * wait, LONGEST_WAIT)


def is_final(error: Exception) -> bool:
    """Whether an error of fsspec stays when the request is repeated: no such file, no permission, a folder.

    Over http fsspec raises FileNotFoundError for every failure; the status is that of the error's cause.
    """
    if isinstance(error, FileNotFoundError) and type(error.__cause__).__module__.partition(".")[0] in (
        "aiohttp",
        "asyncio",
        "builtins",
    ):
        return error.__cause__ is None or getattr(error.__cause__, "status", None) in (401, 403, 404, 410)
    return isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError))


def bounded(function: Callable[[], Found], seconds: float) -> Found:
    """function(), or TimeoutError after so many seconds. Its thread is then left behind: a read that hangs cannot be
    ended."""
    found: list[Found] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            found.append(function())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not found:
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    return found[0]
