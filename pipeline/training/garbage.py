"""Python's garbage collection at fixed steps, so that ranks do not stall one after another."""

import gc
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

EVERY = 200  # steps


def collected_at_fixed_steps(steps: Iterable[Item]) -> Iterator[Item]:
    """Yield from `steps`, with a collection before the first and after every 200th of them, and none between.

    What is there before the first step of the process (imported modules, the model, the index) is left out of all
    collections from then on.
    """
    was_on = gc.isenabled()
    gc.collect()
    if not gc.get_freeze_count():
        gc.freeze()
    gc.disable()
    try:
        for number, step in enumerate(steps):
            if number and number % EVERY == 0:
                gc.collect()
            yield step
    finally:
        if was_on:
            gc.enable()
