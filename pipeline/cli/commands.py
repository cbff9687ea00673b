"""What each command of pipeline/cli/main.py does: the parsed words in, what it says out. Mistakes are raised as
UserError.

Heavy packages are imported in the commands that use them: `safeclip --help` answers at once.
"""

import argparse
import sys
from collections import Counter
from typing import TYPE_CHECKING

from shards.errors import UserError

if TYPE_CHECKING:
    from pipeline.training.signals import StopSignal


def data(args: argparse.Namespace) -> None:
    if args.name == "wordnet":
        from shards.views import wordnet

        wordnet.install(args.out)
        print(f"{args.out}: WordNet {wordnet.opened(str(args.out)).version}")
        return
    if args.name == "shapes":
        from shards.build.shapes import shapes

        shapes(args.out, pairs=args.pairs or 18_000, seed=args.seed)
    elif args.name == "photos":
        from shards.build.photos import PAIRS, photos

        photos(args.out, pairs=PAIRS if args.pairs is None else args.pairs, seed=args.seed)
    else:
        from shards.build.emoji import emoji

        if args.pairs:
            raise UserError("--pairs: the number of emoji pairs follows from the packages; leave it out")
        emoji(args.out, seed=args.seed)
    print(f"{args.out}: train/, test/, index/, labels/ and test_index/ are ready")


def index(args: argparse.Namespace) -> None:
    from shards.index.shard_index import build_index

    built = build_index(
        args.shards, args.out, args.text, args.workers, args.report, args.remote_timeout, args.allow_pipe
    )
    print(f"{args.out}: {built.samples:,} samples in {len(built.shards)} shards, fingerprint {built.fingerprint}")
    for reason, count in Counter(finding.kind for finding in built.findings).most_common():
        print(f"  {count:,} x {reason}" + ("" if args.report else " (--report FILE lists them)"))


def shards_csv(args: argparse.Namespace) -> None:
    from shards.build.ingest import from_csv

    print(from_csv(args.file, args.out, args.root, args.path, args.caption, args.separator, args.per_shard))


def shards_folder(args: argparse.Namespace) -> None:
    from shards.build.ingest import from_folder

    print(from_folder(args.folder, args.out, args.classes, args.per_shard))


def attack(args: argparse.Namespace) -> None:
    from pipeline.attacks.manifest import make_attack
    from pipeline.attacks.sheet import show
    from pipeline.config.load import override, read_yaml

    if (args.config == "show") != bool(args.out) or args.out and len(args.overrides) != 1:
        raise UserError("attack: expected `attack CONFIG [a.b=value]`, or `attack show FOLDER --out sheet.png`")
    if args.out:
        return print(show(args.overrides[0], args.out))
    config = read_yaml(args.config)
    override(config, args.overrides)
    print(make_attack(config))


def config(args: argparse.Namespace) -> None:
    from pipeline.config.load import load_config, make_config, override
    from pipeline.config.reference import listing
    from pipeline.config.schema import PRESETS

    if args.config in PRESETS:
        values = {"preset": args.config}
        override(values, args.overrides)
        found = make_config(values)
    else:
        found = load_config(args.config, args.overrides)
    print(listing(found))


def doctor(args: argparse.Namespace) -> None:
    from pipeline.config.load import load_config

    config = load_config(args.config, args.overrides)
    from pipeline.distributed import comm
    from pipeline.doctor.checks import examine

    found = examine(config, args.ranks, args.content)
    if comm.is_rank0():
        for level, about, text in found:
            print(f"{level:8s}{about}: {text}")
    comm.shutdown()
    if any(level == "fatal" for level, *_ in found):
        sys.exit(2)


def train(args: argparse.Namespace) -> None:
    from pipeline.training.signals import EXIT_CODE, Preempted, StopSignal

    try:
        # From the first moment: the imports that follow take seconds, minutes on a cluster's file system.
        with StopSignal() as stop:
            train_until(stop, args)
    except Preempted:
        sys.exit(EXIT_CODE)


def train_until(stop: "StopSignal", args: argparse.Namespace) -> None:
    from pipeline.config.load import load_config

    config = load_config(args.config, args.overrides)
    from pipeline.config.data import open_index, open_overlay
    from pipeline.distributed import comm
    from pipeline.evaluation.evaluator import Evaluator
    from pipeline.training.run import train as train_run

    evaluators = {}
    if config.evaluation.test:
        overlay = open_overlay(config.data, open_index(config.data))
        evaluators["eval"] = Evaluator(config.evaluation, overlay)
    train_run(config, evaluators, stop)
    comm.shutdown()


def evaluate(args: argparse.Namespace) -> None:
    from pipeline.evaluation.run import evaluate_run, summary

    print(f"{args.run}: {summary(evaluate_run(args.run, args.baseline, args.overrides, args.unpoisoned))}")


def compare(args: argparse.Namespace) -> None:
    from pipeline.evaluation.table import compare as compare_runs

    print(compare_runs(args.clip_run, args.safeclip_run, args.out))


def export(args: argparse.Namespace) -> None:
    from pipeline.config.load import load_config
    from pipeline.training.export import export_run

    export_run(args.run, load_config(f"{args.run}/config.yaml"), args.out)
    print(f'{args.out}: open_clip.create_model_and_transforms("local-dir:{args.out}")')


def mask_show(args: argparse.Namespace) -> None:
    from pipeline.audit.mask_commands import show

    print(show(args.mask, args.json))


def mask_export(args: argparse.Namespace) -> None:
    from pipeline.audit.export import export_mask

    print(f"{args.out}: {export_mask(args.mask, args.format, args.out, args.shards):,} rows, {args.format}")


def mask_diff(args: argparse.Namespace) -> None:
    from pipeline.audit.mask_commands import diff

    print(diff(args.a, args.b, args.out))


def mask_replay(args: argparse.Namespace) -> None:
    from pipeline.audit.mask_commands import replay, what_if

    other = args.posterior is not None or args.fraction is not None
    if other != bool(args.out):
        raise UserError(
            "mask replay: --posterior or --fraction make another mask in --out; give both, or neither to check"
        )
    if other:
        print(what_if(args.mask, args.out, args.posterior, args.fraction))
        return
    same, text = replay(args.mask)
    print(text)
    sys.exit(0 if same else 1)


def mask_apply(args: argparse.Namespace) -> None:
    from pipeline.audit.apply import apply_mask

    print(apply_mask(args.mask, args.shards, args.out, args.keep, args.review))


def mask_filter(args: argparse.Namespace) -> None:
    from pipeline.audit.filter import filter_pairs

    print(filter_pairs(args.scores, args.by, args.remove, args.out))


def mask_oracle(args: argparse.Namespace) -> None:
    from pipeline.audit.filter import keep_unpoisoned
    from shards.index.shard_index import ShardIndex

    print(keep_unpoisoned(args.overlay, ShardIndex.load(args.index), args.out, args.fraction, args.seed))


def score(args: argparse.Namespace) -> None:
    from pipeline.audit.score import score as score_pairs
    from pipeline.distributed import comm

    rest = (args.overlay, args.embeddings, args.lean, args.batch_size, args.workers)
    line = score_pairs(args.out, args.model, args.pretrained, args.data, *rest)
    if comm.is_rank0():
        print(line)
    comm.shutdown()


def audit(args: argparse.Namespace) -> None:
    from pipeline.audit.audit import audit as audit_pairs

    print(audit_pairs(args.source, args.out, args.scores, args.truth, args.detectors, args.worst, args.sample))
