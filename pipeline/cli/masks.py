"""The commands `safeclip mask`: a saved mask without its run."""

import sys

import click

from pipeline.cli.options import PATH, Group, tell
from shards.errors import UserError


@click.group(cls=Group, no_args_is_help=False)
@click.pass_context
def mask(context: click.Context) -> None:
    """Show, export, compare, replay, apply or make a mask. MASK is RUN/masks/epoch_NNN, without its run."""
    from shards.shares import launched

    # The others read no shards: of several processes the first does all.
    if context.invoked_subcommand not in ("export", "apply") and launched().rank:
        context.exit()


@mask.command()
@click.argument("mask", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="the same as JSON")
def show(mask: str, as_json: bool) -> None:
    """Print what a mask is, in a few lines."""
    from pipeline.audit import mask_commands

    print(mask_commands.show(mask, as_json))


@mask.command()
@click.argument("mask", type=PATH)
@click.option("--format", "form", required=True, type=click.Choice(["parquet", "csv", "datacomp", "cleanlab", "keys"]))
@click.option("--out", type=PATH, required=True, metavar="FILE")
@click.option(
    "--shards", type=PATH, multiple=True, metavar="SHARDS...", help="datacomp: the shards, with uids in .json"
)
def export(mask: str, form: str, out: str, shards: tuple[str, ...]) -> None:
    """Write a mask in another format.

    Of all pairs: cosine and posterior (parquet, csv), is_poison_issue and poison_score (cleanlab, a Parquet file). Of
    the safe pairs: sorted uids (datacomp, .npy), shard TAB key (keys).
    """
    from pipeline.audit.export import export_mask
    from shards.shares import launched

    written = export_mask(mask, form, out, shards, launched())
    tell(None if written is None else f"{out}: {written:,} rows, {form}")


@mask.command()
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@click.option("--out", type=PATH, metavar="FILE", help="CSV of the pairs that moved in or out")
def diff(a: str, b: str, out: str | None) -> None:
    """Print how the safe set of mask B differs from that of A."""
    from pipeline.audit import mask_commands

    print(mask_commands.diff(a, b, out))


@mask.command()
@click.argument("mask", type=PATH)
@click.option("--posterior", type=float, help="instead, make the mask of the pairs above this posterior")
@click.option("--fraction", type=float, help="instead, make the mask of this fraction of the pairs")
@click.option("--out", type=PATH, metavar="DIR", help="new folder for that other mask")
def replay(mask: str, posterior: float | None, fraction: float | None, out: str | None) -> None:
    """Rebuild a mask from its scores. The exit code is 1 if it is not the saved one, bit for bit."""
    from pipeline.audit import mask_commands

    if posterior is not None and fraction is not None:
        raise UserError("mask replay: --posterior and --fraction exclude each other; give one of them")
    other = posterior is not None or fraction is not None
    if other != bool(out):
        raise UserError("mask replay: --posterior or --fraction makes another mask in --out; give both or neither")
    if other:
        return print(mask_commands.what_if(mask, out, posterior, fraction))
    same, text = mask_commands.replay(mask)
    print(text)
    sys.exit(0 if same else 1)


@mask.command()
@click.argument("mask", type=PATH)
@click.argument("shards", type=PATH, nargs=-1, required=True)
@click.option("--out", type=PATH, required=True, metavar="DIR")
@click.option("--keep", type=click.Choice(["safe", "risky"]), default="safe")
@click.option(
    "--review", type=PATH, metavar="FILE", help="CSV that a report exported: poison is never safe, fine always is"
)
def apply(mask: str, shards: tuple[str, ...], out: str, keep: str, review: str | None) -> None:
    """Write filtered copies of shards (paths, or lists of them). Resumes where it was interrupted."""
    from pipeline.audit.apply import apply_mask
    from shards.shares import launched

    tell(apply_mask(mask, shards, out, keep, review, share=launched()))


@mask.command("filter")
@click.argument("scores", type=PATH)
@click.option("--by", required=True, type=click.Choice(["cosine", "kdistance", "slof", "dao"]))
@click.option("--remove", type=float, default=0.05, metavar="FRACTION", help="of the pairs (default 0.05)")
@click.option("--out", type=PATH, required=True, metavar="DIR")
def filter_by(scores: str, by: str, remove: float, out: str) -> None:
    """Make a mask of all pairs but the worst, for data.mask.

    The filters are those of other papers. SCORES is what `safeclip score --model RUN --out SCORES` wrote.
    """
    from pipeline.audit.filter import filter_pairs

    print(filter_pairs(scores, by, remove, out))


@mask.command()
@click.argument("overlay", type=PATH)
@click.option("--index", type=PATH, required=True, metavar="DIR", help="the index that it was made for")
@click.option("--fraction", type=float, default=1.0, help="keep only so many random ones of all pairs (default 1)")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="of these random ones")
@click.option("--out", type=PATH, required=True, metavar="DIR")
def oracle(overlay: str, index: str, fraction: float, seed: int, out: str) -> None:
    """Make a mask of all pairs but those that an attack poisons. OVERLAY is a folder of `safeclip attack`."""
    from pipeline.audit.filter import keep_unpoisoned
    from shards.index.shard_index import ShardIndex

    print(keep_unpoisoned(overlay, ShardIndex.load(index), out, fraction, seed))
