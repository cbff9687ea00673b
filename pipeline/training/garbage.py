"""Python's garbage collection at fixed steps, so that ranks do not stall one after another."""

import gc
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

EVERY = 200  # steps


def collected_at_fixed_steps(steps: Iterable[Item]) -> Iterator[Item]:
    """Yield from `steps`, with a collection before the first and after every 200th of them, and none between.

    What is there before the first step (the model, the index) is left out of the collections until the last.
    """
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for number, step in enumerate(steps):
            if number and number % EVERY == 0:
                gc.collect()
            yield step
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()
