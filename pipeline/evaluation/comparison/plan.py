"""What has to be run for cells that have no row yet: tasks that need each other, each one process."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.evaluation.comparison.cells import Cell
from pipeline.evaluation.comparison.results import append_result
from pipeline.training import checkpoint
from shards.storage.files import write_json

SAFECLIP = (sys.executable, "-m", "pipeline.cli")


@dataclass(eq=False)
class Task:
    """A process. marker: a file that says that it is done, with the seconds it took; None: it is done when `finish` has
    been called.

    cell: of a cell's last task, that cell. prepare, finish(seconds it took): called in this process before and after,
    or None.
    """

    name: str
    words: list
    log: Path
    marker: Path | None = None
    needs: list[Task] = field(default_factory=list)
    cell: Cell | None = None
    prepare: Callable[[], None] | None = None
    finish: Callable[[float], None] | None = None

    @property
    def done(self) -> bool:
        return self.marker is not None and self.marker.exists()

    def mark(self, seconds: float) -> None:
        if self.marker:
            self.marker.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.marker, {"seconds": round(seconds, 1)})

    @property
    def seconds(self) -> float:
        """That it took when it was done, this time or an earlier one."""
        return json.loads(self.marker.read_text())["seconds"]


class Plan:
    """tasks: those for `cells`, in an order in which each comes after what it needs. on_row(cell, row): called
    with every new row, or None."""

    def __init__(
        self,
        cells: Iterable[Cell],
        work: str | Path,
        results: str | Path,
        workers: int = 0,
        keep: bool = False,
        on_row: Callable[[Cell, dict], None] | None = None,
    ):
        self.work, self.results, self.keep, self.on_row = Path(work), results, keep, on_row
        self.train_words = [f"data.workers={workers}", "run.keep=1", "evaluation.test=null"]  # it is judged afterwards
        self.tasks: list[Task] = []
        self.known: dict[Path, Task] = {}
        for cell in cells:
            self.evaluation(cell)

    def folder(self, cell: Cell) -> Path:
        """Where the runs of one poisoned set and seed are."""
        return self.work / cell.set.name / f"{cell.group if cell.poisoned else 'unpoisoned'}_seed{cell.seed}"

    def run_dir(self, cell: Cell) -> Path:
        return self.folder(cell) / f"{cell.defence}_{cell.run_key}"

    def add(
        self,
        place: Path,
        name: str,
        words: list,
        *,
        needs: list[Task],
        marker: Path | None = None,
        cell: Cell | None = None,
        prepare: Callable[[], None] | None = None,
        finish: Callable[[float], None] | None = None,
    ) -> Task:
        """The Task at `place`, made once."""
        if place not in self.known:
            log = place.with_name(place.name + ".log")
            self.known[place] = Task(name, words, log, marker, needs, cell, prepare, finish)
            self.tasks.append(self.known[place])
        return self.known[place]

    def training(self, cell: Cell) -> Task:
        run_dir, rule, needs = self.run_dir(cell), cell.rule, []
        words = [*cell.set.overrides, *cell.words, *self.train_words, f"run.dir={run_dir}"]
        words.append(f"data.overlay={cell.overlay if cell.poisoned else 'null'}")
        if rule.mask:
            mask, folder = self.mask(cell)
            needs.append(mask)
            words.append(f"data.mask={folder}")
        if rule.starts_from_none:
            needs.append(self.training(cell.none))
            words.append(f"model.pretrained={self.run_dir(cell.none)}")

        def prepare() -> None:
            if run_dir.exists() and not (run_dir / "checkpoints").exists():
                shutil.rmtree(run_dir)  # of a finished cell whose row was taken out of the results

        def finish(seconds: float) -> None:
            folder, _ = checkpoint.newest_complete(run_dir)
            task.mark(max(seconds, checkpoint.load_state(folder)["seconds"]))  # of earlier calls too

        name, train = f"{cell.label}: training", [*SAFECLIP, "train", cell.set.config, *words]
        marker = run_dir / "finished"
        task = self.add(run_dir, name, train, marker=marker, needs=needs, prepare=prepare, finish=finish)
        return task

    def mask(self, cell: Cell) -> tuple[Task, Path]:
        """(Task, folder) of the mask that the cell trains on."""
        rule, needs = cell.rule, []
        source: list  # words
        folder = self.folder(cell) / f"mask_{cell.defence}_{cell.run_key}"
        if rule.mask[0] == "filter":
            needs, source = [self.scoring(cell.none)], [self.scores(cell.none)]
        else:
            source = [cell.overlay, "--index", cell.config.data.index]
            source += ["--seed", cell.seed] if "--fraction" in rule.mask else []
        words = [*SAFECLIP, "mask", rule.mask[0], *source, *rule.mask[1:], "--out", folder]
        task = self.add(folder, f"{cell.label}: mask", words, marker=folder.with_suffix(".finished"), needs=needs)
        task.prepare = lambda: shutil.rmtree(folder, ignore_errors=True)
        return task, folder

    def scores(self, cell: Cell) -> Path:
        return self.folder(cell) / f"scores_{cell.run_key}"

    def scoring(self, cell: Cell) -> Task:
        folder, run_dir = self.scores(cell), self.run_dir(cell)
        words = [*SAFECLIP, "score", "--model", run_dir, "--out", folder, "--workers", "0"]
        needs = [self.training(cell)]
        return self.add(folder, f"{cell.label}: scoring", words, marker=folder.with_suffix(".finished"), needs=needs)

    def evaluation(self, cell: Cell) -> Task:
        run_dir, training = self.run_dir(cell), self.training(cell)
        place = run_dir.with_name(f"{run_dir.name}_judged_by_{cell.group}")
        if not (run_dir / "checkpoints").exists():
            training.marker.unlink(missing_ok=True)  # there is nothing to judge: it is trained again
        # An unpoisoned run is judged by all groups, each of which writes its eval.json.
        others = [task for task in self.tasks if task.cell and not cell.poisoned and self.run_dir(task.cell) == run_dir]
        words = [*SAFECLIP, "evaluate", run_dir, f"data.overlay={cell.overlay}"]
        words.append(f"evaluation.test={cell.config.evaluation.test}")

        def finish(seconds: float) -> None:
            figures = json.loads((run_dir / "eval.json").read_text())
            own = training.seconds + seconds
            row = cell.row(figures, sum(task.seconds for task in before(training)), own)
            append_result(self.results, row)
            if self.on_row:
                self.on_row(cell, row)
            if cell.poisoned and cell.defence != "none" and not self.keep:
                training.marker.unlink()  # first: without its checkpoints the training is not done
                shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)

        needs = [training, *others]
        return self.add(place, f"{cell.label}: evaluation", words, needs=needs, cell=cell, finish=finish)


def before(task: Task) -> set[Task]:
    """All that a task needs, directly or not."""
    return set().union(*({need} | before(need) for need in task.needs)) if task.needs else set()
