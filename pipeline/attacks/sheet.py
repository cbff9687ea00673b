"""A picture of an attack for people: poisoned pairs as they were and as they are, and a test picture with the
trigger."""

import io
import json
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.attacks.base import load_trigger
from pipeline.attacks.manifest import write_named
from shards.errors import BadSample, UserError
from shards.index.shard_index import ShardIndex
from shards.samples.overlay import Overlay
from shards.samples.samples import Samples

SIDE, GAP, LINE, CHARACTERS = (
    128,
    10,
    14,
    40,
)  # pixels of a picture's side, between cells, and of a line of text; letters in a line
HIDDEN = "triggers", "digest", "pixels", "surrogate", "seed"  # not settings of a trigger, or long
CELL = 2 * SIDE + 2 * GAP
HEIGHT = 3 * LINE + SIDE + 6 * LINE
Cell = tuple[str, Image.Image | None, Image.Image | None, str]  # title, picture before, picture after, text


def show(folder: str | Path, out: str | Path, pairs: int = 4) -> str:
    """Write a PNG at `out` of the manifest in `folder` (or of that name): for each attack some `pairs`, and a test
    picture; returns a line. Raises UserError."""
    folder = Path(folder).parent if Path(folder).name == "manifest.json" else Path(folder)
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        classes, index = manifest["classes"], ShardIndex.load(manifest["index"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"overlay {path}: cannot be read ({error}); make it with `safeclip attack CONFIG`") from None
    overlay = Overlay.load(folder, index, load_trigger)
    clean, poisoned = Samples(index), Samples(index, overlay)
    sheet = Image.new("RGB", (GAP + (pairs + 1) * CELL, GAP + len(overlay.kinds) * HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (kind, entry) in enumerate(overlay.kinds.items()):
        top = GAP + number * HEIGHT
        write(draw, GAP, top, headline(kind, entry), 240, lines=2)
        rows = [row for row in overlay.rows if row["kind"] == kind]
        decoys = [row for row in overlay.decoys if row["kind"] == f"{kind}_decoy"][:1]
        shown = [pair_cell(clean, poisoned, row) for row in (rows[: pairs - len(decoys)] + decoys)]
        shown.append(test_cell(overlay, poisoned.source, kind, classes))
        for column, (title, before, after, text) in enumerate(shown):
            left = GAP + column * CELL
            write(draw, left, top + 2 * LINE, title)
            for at, image in enumerate((before, after)):
                sheet.paste(enlarged(image), (left + at * (SIDE + 2), top + 3 * LINE))
            write(draw, left, top + 3 * LINE + SIDE + 4, text)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    write_named(out, file.getvalue(), "--out")
    return f"{out}: {len(overlay.kinds)} attacks, each with poisoned pairs and, last, a test picture"


def headline(kind: str, entry: dict) -> str:
    """What an attack is, in two lines."""
    trigger = entry.get("trigger", {})
    settings = [one.items() for one in (trigger, *trigger.get("triggers", []))]
    settings = [
        [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in one if k not in HIDDEN] for one in settings
    ]
    numbers = "; ".join(map(", ".join, settings))
    target = f", target class {entry['class']}" if "class" in entry else ""
    return f"{kind}: {entry['attack']}, {entry['pairs']} pairs{target}\n{numbers}"


def pair_cell(clean: Samples, poisoned: Samples, row: dict) -> Cell:
    """Of a poisoned pair."""
    place = row["shard"], row["position"]
    before, after = picture(clean, place), picture(poisoned, place)
    was, now = (" ".join(one.split())[: 2 * CHARACTERS - 8] for one in (caption(clean, place), row["caption"]))
    text = f"was: {was}\nis: {now}"
    return f"{row['kind']}: shard {place[0]}, pair {place[1]}", before, after, text


def test_cell(overlay: Overlay, test: Samples, kind: str, classes: list[str]) -> Cell:
    """Of a test picture that the attack is judged by: a target, or the first picture of a class that it is to
    change."""
    entry = overlay.kinds[kind]
    if "targets" in entry:
        target = entry["targets"][0]
        place = target["shard"], target["position"]
        text = f"{classes[target['true_class']]}, to be read as {classes[target['adversarial_class']]}"
        return "test picture, a target", picture(test, place), picture(test, place), text
    places = ((shard, position) for shard, count in enumerate(test.index.counts) for position in range(int(count)))
    source, target = entry.get("source_class"), entry["target_class"]
    wanted = (p for p in places if test.label(*p) != target and source in (None, test.label(*p)))
    place = next(wanted, None)
    if place is None:
        return "no test picture", None, None, ""
    before, trigger = picture(test, place), overlay.trigger(kind)
    after = trigger.apply(before, place) if trigger and before else before
    return "test picture", before, after, f"{classes[test.label(*place)]}, to be read as {classes[target]}"


def picture(samples: Samples, place: tuple[int, int]) -> Image.Image | None:
    """RGB, or None where it cannot be read."""
    try:
        return samples.image(*place)
    except BadSample:
        return None


def caption(samples: Samples, place: tuple[int, int]) -> str:
    try:
        return samples.caption(*place)
    except BadSample as error:
        return f"({error})"


def enlarged(image: Image.Image | None) -> Image.Image:
    """The picture in a square of SIDE pixels: small ones by whole numbers, so that each pixel is seen; grey where there
    is none."""
    square = Image.new("RGB", (SIDE, SIDE), (225, 225, 225))
    if image is None:
        return square
    scale = SIDE / max(image.size)
    if scale >= 1:
        image = image.resize((image.width * int(scale), image.height * int(scale)), Image.Resampling.NEAREST)
    else:
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    left, top = (int(at) for at in (np.array(square.size) - image.size) // 2)
    square.paste(image, (left, top))
    return square


def write(draw: ImageDraw.ImageDraw, left: int, top: int, text: str, width: int = CHARACTERS, lines: int = 5) -> None:
    """Lines of text, each wrapped to `width` letters; `lines` in all."""
    wrapped = [part for line in text.split("\n") for part in textwrap.wrap(line, width) or [""]][:lines]
    font = ImageFont.load_default(LINE - 3)
    for number, line in enumerate(wrapped):
        draw.text((left, top + number * LINE), line, "black", font)
