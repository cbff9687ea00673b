"""Commands that judge the data: score, audit."""

from typing import Any

import click

from pipeline.cli.options import COUNT, FRACTION, PATH, Command


@click.command(cls=Command)
@click.option(
    "--model", type=PATH, help="a run, an open_clip local directory, or an open_clip name (with --pretrained)"
)
@click.option("--pretrained", type=PATH, metavar="PATH", help="checkpoint for an open_clip name")
@click.option("--data", type=PATH, multiple=True, metavar="SHARDS...", help="shards as for `index`, or an index folder")
@click.option("--overlay", type=PATH, metavar="DIR", help="an attack to read the data with (default: that of the run)")
@click.option(
    "--embeddings", type=PATH, metavar="DIR", help="instead: embeddings that exist, as clip-retrieval writes them"
)
@click.option("--lean", is_flag=True, help="keep cosines and captions only: no embeddings, no picture hashes")
@click.option("--batch-size", type=COUNT, default=256)
@click.option("--workers", type=click.IntRange(min=0), default=2, help="reading processes of each rank")
@click.option("--out", type=PATH, required=True, metavar="DIR")
def score(**options: Any) -> None:
    """Score every pair with any CLIP. Writes cosines and a mask by posterior. Also runs under torchrun; resumes."""
    from pipeline.training.signals import ExitOnSignal

    with ExitOnSignal(f"{options['out']}: shards that are scored are kept, the same command scores the rest"):
        from pipeline.audit.score import score as score_pairs
        from pipeline.distributed import comm

        with comm.naming_the_lost():
            line = score_pairs(**options)
        if comm.is_rank0():
            print(line)
        comm.shutdown()


@click.command(cls=Command)
@click.argument("source", type=PATH, metavar="RUN_OR_SCORES")
@click.option(
    "--scores", type=PATH, metavar="DIR", help="what `safeclip score --model RUN` wrote, for detectors with embeddings"
)
@click.option(
    "--truth", type=PATH, metavar="DIR", help="an attack manifest to judge by (default: that of the run or the scores)"
)
@click.option(
    "--detectors", multiple=True, metavar="NAME...", help="only these, families or `default` (all without a package)"
)
@click.option("--worst", type=FRACTION, default=0.01, help="fraction of the pairs that a ranking detector flags (0.01)")
@click.option(
    "--sample", type=COUNT, default=1024, metavar="N", help="random pictures to look for neighbours in (1024)"
)
@click.option("--out", type=PATH, required=True, metavar="DIR")
def audit(**options: Any) -> None:
    """Find what is wrong with the data of a run or of scores.

    RUN_OR_SCORES is a run directory, or a folder written by `safeclip score`. Writes DIR/findings.parquet,
    findings.csv, audit.json and report.html. kdistance, slof and dao look for neighbours among N random pictures; above
    65,536 faiss's IVF searches them.
    """
    from pipeline.training.signals import ExitOnSignal

    done = "findings of the detectors that have run are kept, the same command runs the others"
    with ExitOnSignal(f"{options['out']}: {done}"):
        from pipeline.audit.audit import audit as audit_pairs

        print(audit_pairs(**options))
