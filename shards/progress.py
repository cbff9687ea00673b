"""Progress of a loop: a bar on a terminal, lines of the log elsewhere."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

EVERY = 30.0  # seconds between lines


def progress(items: Iterable[Item], total: int | None, what: str, shown: bool = True) -> Iterator[Item]:
    """Yield the `total` items, and show how many the caller is done with: by tqdm on a terminal, else in the log.

    total: None where it is not known; what: the items, for example "shards indexed". shown=False shows nothing, as on
    ranks other than 0.
    """
    terminal, said = sys.stderr.isatty(), time.monotonic()
    bar = tqdm(items, what, total, dynamic_ncols=True, disable=not (shown and terminal))
    for done, item in enumerate(bar, 1):
        yield item
        if shown and not terminal and time.monotonic() - said >= EVERY:
            said = time.monotonic()
            logger.info(f"{done:,} {'' if total is None else f'of {total:,} '}{what}")
