"""How far a comparison is, and how long it will take: from what finished cells of the same defence took."""

import time
from collections.abc import Iterable

import numpy as np

from pipeline.evaluation.comparison.cells import Cell
from pipeline.evaluation.comparison.pool import Pool


class Progress:
    """Called with the Pool: the progress line. cells: those that are to be run; rows: of finished ones, of this call
    and of earlier ones."""

    def __init__(self, cells: Iterable[Cell], rows: Iterable[dict], jobs: int):
        self.cells, self.rows, self.jobs = list(cells), list(rows), jobs
        self.left = set(cells)

    def finished(self, cell: Cell, row: dict) -> None:
        self.left.discard(cell)
        self.rows.append(row)

    def __call__(self, pool: Pool) -> str:
        now = time.monotonic()
        done, running = len(self.cells) - len(self.left), [task.name for task in pool.running]
        text = f"{done} of {len(self.cells)} cells done"
        if pool.failed:
            text += f", {len(pool.failed)} tasks failed"
        if pool.stopped:
            return f"{text}; stopping, {len(running)} processes save what they have"
        if not self.left:
            return text
        spent = sum(now - began for _, began, _ in pool.running.values())
        costs = [self.cost(cell) for cell in self.left]
        # What has no task left to wait for, as it failed, is no time to come.
        if None in costs:
            return f"{text}, {len(running)} processes running, time left not known yet"
        seconds = max(sum(costs) - spent, 0) / self.jobs
        return f"{text}, {len(running)} processes running, about {duration(seconds)} left"

    def cost(self, cell: Cell) -> float | None:
        """Seconds of a cell: the mean over finished ones of its set and defence, else of its set; None where there are
        none."""
        of_set = [row for row in self.rows if row["set"] == cell.set.name]
        alike = [row for row in of_set if row["defence"] == cell.defence] or of_set
        return float(np.mean([row["seconds_own"] for row in alike])) if alike else None


def duration(seconds: float) -> str:
    """ "2 h 05 min"."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
