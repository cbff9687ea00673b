"""Runs the comparison: what has no row in the results file yet, several runs at a time, and then the report.

    python -m pipeline.evaluation.comparison --sets photos --attacks a --defences none paper oracle --seeds 0 1 2

A call that is interrupted goes on where it was cut off when it is given again. Exit codes: 0 done, 1 something failed, 2 a mistake of yours,
75 asked to stop.
"""

import argparse
import fcntl
import os
import sys
from pathlib import Path

from pipeline.evaluation.comparison.cells import Cell
from pipeline.evaluation.comparison.defences import DEFENCES
from pipeline.evaluation.comparison.plan import SAFECLIP, Plan, Task
from pipeline.evaluation.comparison.pool import Pool
from pipeline.evaluation.comparison.progress import Progress
from pipeline.evaluation.comparison.protocol import SEEDS
from pipeline.evaluation.comparison.report import write_report
from pipeline.evaluation.comparison.results import read_results
from pipeline.evaluation.comparison.sets import read_sets
from pipeline.training.signals import EXIT_CODE
from shards.errors import UserError

CURVES = ("none", "paper", "default")  # the defences of rate curves


def arguments(words=None):
    top = argparse.ArgumentParser(
        prog="launch/reproduce.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--sets", nargs="+", metavar="SET", help="default: all of the definition")
    top.add_argument(
        "--attacks", nargs="+", metavar="GROUP", help="attack groups, and unpoisoned: the controls (default: all)"
    )
    top.add_argument("--defences", nargs="+", metavar="NAME", help=f"of {', '.join(DEFENCES)} (default: all)")
    top.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="N", help="default: 0 1 2")
    top.add_argument(
        "--rates", nargs="+", type=int, default=(), metavar="N", help="instead: curves over so many poisoned pairs"
    )
    top.add_argument("--jobs", type=int, help="processes at a time (default: a core each; with GPUs four a GPU)")
    top.add_argument(
        "--definition", default="configs/comparison.yaml", metavar="FILE", help="of the sets (default: %(default)s)"
    )
    top.add_argument(
        "--work", default="runs/comparison", metavar="DIR", help="runs, masks, logs (default: %(default)s)"
    )
    top.add_argument("--results", default="tests/benchmarks/results.jsonl", metavar="FILE", help="default: %(default)s")
    top.add_argument("--keep", action="store_true", help="keep the checkpoints of finished runs")
    top.add_argument("--report-only", action="store_true", help="run nothing")
    args = top.parse_args(words)
    for name in args.defences or ():
        if name not in DEFENCES:
            raise UserError(f"--defences: got {name!r}, expected some of {', '.join(DEFENCES)}")
    return args


def main(words=None):
    args = arguments(words)
    rows = read_results(args.results)
    failed, stopped = {}, False
    if not args.report_only:
        failed, stopped = compare(args, rows)
    print(write_report(Path(args.results), args.definition))
    for name, why in failed.items():
        print(f"not done: {name}: {why}", file=sys.stderr)
    if stopped:
        print("stopped; the same command goes on", file=sys.stderr)
        return EXIT_CODE
    return 1 if failed else 0


def compare(args, rows):
    """({name of what failed: why}, whether a signal ended it): run the cells that have no row."""
    sets = read_sets(args.definition, args.sets, args.rates)
    groups = chosen_groups(args, sets)
    gpus = visible_gpus()
    jobs = args.jobs or (4 * len(gpus) if gpus else os.cpu_count())
    workers = max(1, os.cpu_count() // jobs - 1) if gpus else 0
    locks = [lock(Path(args.work) / name) for name in sets]

    def run(tasks, progress):
        tasks = [task for task in tasks if not task.done]
        if not tasks:
            return {}, False
        pool = Pool(jobs, progress, gpus, locks)
        failed = pool.run(tasks)
        return {task.name: why for task, why in failed.items()}, pool.stopped

    made = [task for one in sets.values() for task in data_tasks(one, Path(args.work))]
    failed, stopped = run(made, lambda pool: "making data")
    usable = [one for one in sets.values() if f"{one.name}: data" not in failed]
    places = {
        (one.name, g, s): overlay(one, g, s, Path(args.work))
        for one in usable
        for g in groups[one.name]
        for s in args.seeds
    }
    attacks = {place: attack_task(sets[place[0]], *place[1:], folder) for place, folder in places.items()}
    if not stopped:
        lost, stopped = run(list(attacks.values()), lambda pool: f"making {len(attacks)} poisoned sets")
        failed |= lost
    if stopped:
        return failed, True
    cells = []
    for seed in args.seeds:
        for one in usable:
            for group in [g for g in groups[one.name] if attacks[one.name, g, seed].name not in failed]:
                cells += cells_of(args, one, group, seed, places[one.name, group, seed])
    there = {row["cell"] for row in rows}
    todo = [cell for cell in cells if cell.key not in there]
    print(
        f"{len(cells)} cells, {len(cells) - len(todo)} of them done already, {jobs} processes at a time",
        file=sys.stderr,
    )
    progress = Progress(todo, rows, jobs)
    plan = Plan(todo, args.work, args.results, workers, args.keep, progress.finished)
    lost, stopped = run(plan.tasks, progress)
    return failed | lost, stopped


def chosen_groups(args, sets):
    """{set: [attack group]} that --attacks names; of "unpoisoned" alone all, by which the controls are judged. Raises UserError."""
    named = [name for name in args.attacks or () if name != "unpoisoned"]
    for name in named:
        if not any(name in one.attacks for one in sets.values()):
            raise UserError(
                f"--attacks: got {name!r}, expected some of {', '.join({g for s in sets.values() for g in s.attacks})}"
            )
    return {name: [g for g in one.attacks if not named or g in named] for name, one in sets.items()}


def cells_of(args, one, group, seed, folder):
    """List of Cell: of one poisoned set, and of its controls."""
    poisoned = not args.attacks or set(args.attacks) != {"unpoisoned"}
    controls = "unpoisoned" in args.attacks if args.attacks else not args.rates
    names = args.defences or (CURVES if args.rates else DEFENCES)
    cells = [Cell(one, group, name, seed, folder) for name in names] if poisoned else []
    if controls:
        cells += [Cell(one, group, name, seed, folder, poisoned=False) for name in names if DEFENCES[name].control]
    return cells


def data_tasks(one, work):
    """The Task that makes a set's data; [] where they are there, or are the user's own."""
    if not one.data or (Path(one.load().data.index) / "index.json").exists():
        return []
    return [
        Task(
            f"{one.name}: data",
            [*SAFECLIP, "data", *one.data],
            work / one.name / "data.log",
            finish=lambda seconds: None,
        )
    ]


def overlay(one, group, seed, work):
    """The folder of a group's attack, of a name that changes with what it poisons."""
    return work / one.name / "attacks" / f"{group}_seed{seed}_{one.attacks[group].digest(one.fingerprint, seed)}"


def attack_task(one, group, seed, folder):
    attack = one.attacks[group]
    words = [*SAFECLIP, "attack", attack.config, *attack.overrides, f"seed={seed}", f"out={folder}"]
    marker, log = folder.with_suffix(".finished"), folder.with_suffix(".log")
    return Task(f"{one.name} {group} seed {seed}: attack", words, log, marker)


def lock(folder):
    """A descriptor that says that this process, and those that it starts, work in the folder. Raises UserError where others do."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(
            f"--work: another comparison, or a run that one left behind, is at work in {folder}; wait until it has ended, "
            "or name another folder"
        ) from None
    return descriptor


def visible_gpus():
    """Numbers of the GPUs that may be used."""
    import torch

    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"launch/reproduce.sh: {error}", file=sys.stderr)
        sys.exit(2)
