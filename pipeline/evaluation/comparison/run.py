"""A call of the comparison: data and attacks are made where they are missing, then the cells without a row are run."""

import argparse
import fcntl
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.evaluation.comparison.cells import Cell, place_of
from pipeline.evaluation.comparison.defences import DEFENCES
from pipeline.evaluation.comparison.plan import SAFECLIP, Plan, Task
from pipeline.evaluation.comparison.pool import Pool
from pipeline.evaluation.comparison.progress import Progress
from pipeline.evaluation.comparison.results import append_result, read_results
from pipeline.evaluation.comparison.sets import DataSet, read_sets
from shards.errors import UserError
from shards.views import wordnet

logger = logging.getLogger(__name__)

CURVES = ("none", "paper", "default")  # the defences of rate curves


def compare(args: argparse.Namespace) -> tuple[dict[str, str], bool]:
    """({name of what failed: why}, whether a signal ended it) of the arguments of __main__.py. Raises UserError."""
    sets = read_sets(args.definition, args.sets, args.rates)
    groups = chosen_groups(args.attacks, sets)
    with ExitStack() as stack:
        locks = [stack.enter_context(locked(Path(args.work) / name)) for name in sets]
        return compare_sets(args, sets, groups, locks)


def compare_sets(
    args: argparse.Namespace, sets: dict[str, DataSet], groups: dict[str, list[str]], locks: list[int]
) -> tuple[dict[str, str], bool]:
    """`compare`, the folders being this process's."""
    rows, work, gpus, cores = read_results(args.results), Path(args.work), visible_gpus(), os.cpu_count()
    jobs = args.jobs or (4 * len(gpus) or cores)
    failed: dict[str, str] = {}

    def run(tasks: Iterable[Task], progress: Callable[[Pool], str]) -> bool:
        """Whether a signal ended it; what failed is in `failed`."""
        pool = Pool(jobs, progress, gpus, locks)
        pool.run([task for task in tasks if not task.done])
        failed.update({task.name: why for task, why in pool.failed.items()})
        return pool.stopped

    tasks = [task for one in sets.values() for task in data_tasks(one, work)]
    if run([*tasks, *wordnet_tasks(sets, rules_of(args), work)], lambda pool: "making data"):
        return failed, True
    made = {
        (one, group, seed): one.overlay(group, seed, work)
        for seed in args.seeds
        for one in sets.values()
        if f"{one.name}: data" not in failed
        for group in groups[one.name]
    }
    surrogates: dict[str, Task] = {}
    attacks = {place: attack_task(*place, folder, surrogates) for place, folder in made.items()}
    if run([*surrogates.values(), *attacks.values()], lambda pool: "making poisoned sets"):
        return failed, True
    there = [place for place in made if attacks[place].name not in failed]
    cells = [cell for place in there for cell in cells_of(args, *place, made[place])]
    known = {row["cell"] for row in rows} | ({place_of(row) for row in rows} if args.trust_rows else set())
    bring_back(cells, rows, args)
    todo = [cell for cell in cells if not {cell.key, cell.place} & known]
    logger.info(f"{len(cells)} cells, {len(todo)} of them to be run, {jobs} processes at a time")
    progress, workers = Progress(todo, rows, jobs), max(1, cores // jobs - 1) if gpus else 0
    plan = Plan(todo, work, args.results, workers, args.keep, progress.finished)
    return failed, run(plan.tasks, progress)


def bring_back(cells: list[Cell], rows: list[dict], args: argparse.Namespace) -> None:
    """Write again the rows of cells that later rows stand in front of, so that they count: a config was changed, and
    changed back."""
    by_key, last = {row["cell"]: row for row in rows}, {place_of(row): row["cell"] for row in rows}
    for cell in cells:
        if cell.key in by_key and last[cell.place] != cell.key and not args.trust_rows:
            append_result(args.results, by_key[cell.key])


def chosen_groups(named: Sequence[str] | None, sets: dict[str, DataSet]) -> dict[str, list[str]]:
    """{set: [attack group]} that --attacks names; of "unpoisoned" alone all, by which the controls are judged. Raises
    UserError."""
    named = [name for name in named or () if name != "unpoisoned"]
    there = {group for one in sets.values() for group in one.attacks}
    for name in named:
        if name not in there:
            raise UserError(f"--attacks: got {name!r}, expected some of {', '.join([*sorted(there), 'unpoisoned'])}")
    return {name: [g for g in one.attacks if not named or g in named] for name, one in sets.items()}


def rules_of(args: argparse.Namespace) -> Sequence[str]:
    """Names of the defences."""
    return args.defences or (CURVES if args.rates else list(DEFENCES))


def cells_of(args: argparse.Namespace, one: DataSet, group: str, seed: int, folder: Path) -> list[Cell]:
    """The cells of one poisoned set, and of its controls."""
    named = args.attacks or [group, *([] if args.rates else ["unpoisoned"])]
    rules = rules_of(args)
    cells = [Cell(one, group, name, seed, folder) for name in rules] if set(named) != {"unpoisoned"} else []
    if "unpoisoned" in named:
        cells += [Cell(one, group, name, seed, folder, poisoned=False) for name in rules if DEFENCES[name].control]
    return cells


def data_tasks(one: DataSet, work: Path) -> list[Task]:
    """The Task that makes a set's data; [] where they are there, or are the user's own."""
    if not one.data or (Path(one.load().data.index) / "index.json").exists():
        return []
    return [Task(f"{one.name}: data", [*SAFECLIP, "data", *one.data], work / one.name / "data.log")]


def wordnet_tasks(sets: dict[str, DataSet], defences: Iterable[str], work: Path) -> list[Task]:
    """The Task that fetches WordNet where a defence takes synonyms from it and it is not there; not for the user's own
    shards."""
    cells = [Cell(one, "", name, 0, Path()) for one in sets.values() if one.data for name in defences]
    if wordnet.find() or not any(cell.synonyms and cell.config.data.eda_synonyms == "wordnet" for cell in cells):
        return []
    return [Task("WordNet", [*SAFECLIP, "data", "wordnet", "data/wordnet"], work / "wordnet.log")]


def attack_task(one: DataSet, group: str, seed: int, folder: Path, surrogates: dict[str, Task]) -> Task:
    """The Task that poisons a set; those that it needs are added to `surrogates`, {run directory: Task}."""
    attack, needs = one.attacks[group], []
    for run_dir in sorted(attack.surrogates):
        if run_dir not in surrogates:
            surrogates[run_dir] = surrogate_task(one, Path(run_dir))
        needs.append(surrogates[run_dir])
    words = [*SAFECLIP, "attack", attack.config, *attack.overrides, f"seed={seed}", f"out={folder}"]
    marker, log = folder.with_suffix(".finished"), folder.with_suffix(".log")
    return Task(f"{one.name} {group} seed {seed}: attack", words, log, marker, needs)


def surrogate_task(one: DataSet, run_dir: Path) -> Task:
    """The Task that trains plain CLIP without poison, of weights that no cell has, on which an attacker optimises a
    trigger."""
    words = [*SAFECLIP, "train", one.config, *one.overrides, "preset=clip", "run.seed=1000", f"run.dir={run_dir}"]
    words += ["data.workers=0", "evaluation.test=null"]
    log, marker = run_dir.with_name(f"{run_dir.name}.log"), run_dir / "finished"
    return Task(f"{one.name}: surrogate {run_dir}", words, log, marker)


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """A descriptor that says that this process, and those that it starts, work in the folder. Raises UserError where
    others do."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"--work: another comparison, or a run that one left behind, is at work in {folder}; "
                "wait until it has ended, or name another folder"
            ) from None
        yield file.fileno()


def visible_gpus() -> list[str]:
    """Numbers of the GPUs that may be used."""
    import torch

    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
