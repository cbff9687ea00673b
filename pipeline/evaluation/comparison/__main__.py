"""Compares defences: runs the cells that have no row in the results file yet, several at a time, and writes the report.

    launch/reproduce.sh --sets photos --attacks a --defences none paper oracle --seeds 0 1 2

An interrupted call resumes when it is given again. Exit codes: 0 done, 1 something failed, 2 a mistake in the
arguments, 75 asked to stop.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline import logs
from pipeline.evaluation.comparison.defences import DEFENCES
from pipeline.evaluation.comparison.document import write_report
from pipeline.evaluation.comparison.protocol import SEEDS
from pipeline.evaluation.comparison.run import compare
from pipeline.training.signals import EXIT_CODE
from shards.errors import UserError
from shards.storage.paths import expanded

logger = logging.getLogger(__package__)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="launch/reproduce.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = top.add_argument
    add("--sets", nargs="+", metavar="SET", help="default: all of the definition")
    add("--attacks", nargs="+", metavar="GROUP", help="groups, and unpoisoned: the controls (default: all)")
    add("--defences", nargs="+", metavar="NAME", help=f"of {', '.join(DEFENCES)} (default: all)")
    add("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="N", help="default: 0 1 2")
    add("--rates", nargs="+", type=int, default=(), metavar="N", help="instead: curves over so many poisoned pairs")
    add("--jobs", type=int, help="processes at a time (default: one a core; with GPUs four a GPU)")
    add(
        "--definition",
        type=expanded,
        default="configs/comparison.yaml",
        metavar="FILE",
        help="of the sets (default: %(default)s)",
    )
    add(
        "--work",
        type=expanded,
        default="runs/comparison",
        metavar="DIR",
        help="runs, masks, logs (default: %(default)s)",
    )
    add(
        "--results",
        type=expanded,
        default="tests/benchmarks/results.jsonl",
        metavar="FILE",
        help="default: %(default)s",
    )
    add("--keep", action="store_true", help="keep the checkpoints of finished runs")
    text = "run no cell again that has a row, though its config, data or attack may have changed since"
    add("--trust-rows", action="store_true", help=text)
    add("--report-only", action="store_true", help="run nothing")
    return top


def main(words: Sequence[str] | None = None) -> int:
    args = parser().parse_args(words)
    logs.set_up()
    for name in args.defences or ():
        if name not in DEFENCES:
            raise UserError(f"--defences: got {name!r}, expected some of {', '.join(DEFENCES)}")
    failed, stopped = ({}, False) if args.report_only else compare(args)
    print(write_report(Path(args.results), args.definition))
    for name, why in failed.items():
        logger.error(f"not done: {name}: {why}")
    if stopped:
        logger.info("stopped; the same command resumes")
        return EXIT_CODE
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        code = main()
    except UserError as error:
        print(f"launch/reproduce.sh: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)
