"""Rendered scenes with captions: a data set that needs no download, in which an attack can be measured.

One coloured shape (6 shapes x 6 colours = 36 classes) of some texture, size, place and turn on some background, with
marks that distract; captions name colour and shape, and by chance the rest, in many forms.
"""

import io
import json
import math
import shutil
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

from shards.build.write import write_shards, write_test_set
from shards.errors import UserError
from shards.index.build_index import build_index
from shards.storage.files import write_bytes, write_json

Option = TypeVar("Option")
SIZE, FINE = 32, 3  # pixels of a side; rendered this many times larger, then reduced
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (242, 201, 30),
    "purple": (142, 48, 180),
    "white": (245, 245, 245),
}
BACKGROUNDS = {
    "grey": (128, 128, 128),
    "black": (24, 24, 24),
    "brown": (112, 72, 40),
    "teal": (20, 100, 104),
    "pink": (226, 158, 176),
    "beige": (196, 180, 140),
}
TEXTURES = ("plain", "striped", "dotted", "hatched")
SIZES = {"small": 0.2, "medium": 0.27, "large": 0.36}  # radius over the picture's side
PLACES = {
    "upper left": (-1, -1),
    "top": (0, -1),
    "upper right": (1, -1),
    "left": (-1, 0),
    "centre": (0, 0),
    "right": (1, 0),
    "lower left": (-1, 1),
    "bottom": (0, 1),
    "lower right": (1, 1),
}
CLASSES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
TEMPLATES = ["a picture of a {c}", "a {c}", "a drawing of a {c}", "there is a {c}", "an image showing a {c}"]
FORMS = (
    "a picture of {x}{place}{ground}",
    "{x}{place}{ground}",
    "there is {x}{place}{ground}",
    "an image showing {x}{place}{ground}",
    "a drawing of {x}{place}{ground}",
    "{ground_first}{x}{place}",
    "someone drew {x}{place}{ground}",
    "one can see {x}{place}{ground}",
    "a simple scene with {x}{place}{ground}",
    "here we have {x}{place}{ground}",
)


def shapes(out: str | Path, pairs: int = 18_000, test: int = 1_080, seed: int = 0) -> None:
    """Build the data set in OUT: train/, test/ (CLIP_benchmark layout), index/, labels/ (of train), test_index/,
    test_captions/.

    A finished one with the same arguments is used again. Raises UserError when OUT holds something else.
    """
    if pairs < 1:
        raise UserError(f"--pairs: got {pairs}, expected 1 or more")
    build(
        out,
        {"data": "shapes", "pairs": pairs, "test": test, "seed": seed},
        lambda: (
            (render(number, seed) for number in range(pairs)),
            (render(number, seed) for number in range(pairs, pairs + test)),
            CLASSES,
        ),
        TEMPLATES,
    )


def build(
    out: str | Path,
    made_by: dict,
    make: Callable[[], tuple[Iterable[dict], Iterable[dict], list[str]]],
    templates: list[str],
) -> None:
    """Write and index what make() gives, (train samples, test samples, class names), in OUT; `made_by` marks it as
    finished."""
    out = Path(out)
    marker, unfinished = out / "made_by.json", out / "unfinished"
    if unfinished.exists():
        shutil.rmtree(out)  # our own, cut off
    if marker.exists() and json.loads(marker.read_text()) == made_by:
        index_parts(out, captions=(out / "test_captions").exists())  # what is indexed already is not read again
        return
    if out.exists() and any(out.iterdir()):
        held = (
            f"data made by {marker.read_text().strip()}"
            if marker.exists()
            else "files that are not a finished data set"
        )
        raise UserError(f"{out}: holds {' '.join(held.split())}; delete it or name another folder")
    write_bytes(unfinished, b"")
    train, test, classes = make()
    write_shards(train, out / "train")
    test = list(test)
    write_test_set(test, classes, templates, out)
    index_parts(out, captions=all("txt" in sample for sample in test))
    write_json(marker, made_by)
    unfinished.unlink()


def index_parts(out: Path, captions: bool) -> None:
    """Index OUT/train and OUT/test: captions and labels of the one, labels of the other, and its captions if it has
    any."""
    parts = [("train", "index", "txt"), ("train", "labels", "cls"), ("test", "test_index", "cls")]
    for part, name, text in parts + ([("test", "test_captions", "txt")] if captions else []):
        paths = sorted(map(str, (out / part).glob("*.tar")), key=lambda path: (len(path), path))  # 2.tar before 10.tar
        build_index(paths, out / name, text=text)


def render(number: int, seed: int) -> dict:
    """The sample with this number: {"__key__", "png", "cls", "txt"}; a pure function of (number, seed)."""
    rng = np.random.default_rng([seed, number])
    pick = partial(choose, rng)
    colour, shape, ground = pick(COLOURS), pick(SHAPES), pick(BACKGROUNDS)
    texture, size, place = pick(TEXTURES), pick(SIZES), pick(PLACES)
    file = io.BytesIO()
    draw_scene(rng, colour, shape, ground, texture, size, place).save(file, "PNG")
    sample = {"__key__": f"{number:06d}", "png": file.getvalue(), "cls": CLASSES.index(f"{colour} {shape}")}
    return {**sample, "txt": caption(rng, colour, shape, ground, texture, size, place)}


def choose(rng: np.random.Generator, options: Collection[Option]) -> Option:
    return list(options)[rng.integers(len(options))]


def caption(rng: np.random.Generator, colour: str, shape: str, ground: str, texture: str, size: str, place: str) -> str:
    """One of many natural forms; colour and shape always, the rest by chance."""
    said = (rng.random(4) < (0.4, 0.4, 0.5, 0.4)).tolist()
    words = [size] * said[0] + [texture] * (said[1] and texture != "plain") + [colour, shape]
    where = (
        f" in the {place}"
        if place in ("centre", "upper left", "upper right", "lower left", "lower right")
        else f" at the {place}"
    )
    on = f"a {ground} background"
    form = choose(rng, FORMS)
    return form.format(
        x="a " + " ".join(words),
        place=where if said[2] else "",
        ground=f" on {on}" if said[3] else "",
        ground_first=f"on {on} ",
    ).strip()


def draw_scene(
    rng: np.random.Generator, colour: str, shape: str, ground: str, texture: str, size: str, place: str
) -> Image.Image:
    """RGB picture of SIZE x SIZE."""
    side = SIZE * FINE
    pixels = np.empty((side, side, 3))
    pixels[:] = BACKGROUNDS[ground]
    # Light falls from one side, and nothing is smooth.
    slope = np.linspace(-1, 1, side)[:, None] * rng.uniform(-18, 18) + np.linspace(-1, 1, side)[None] * rng.uniform(
        -18, 18
    )
    pixels += slope[..., None] + rng.normal(0, 5, (side, side, 1))
    canvas = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(0, 4)):  # marks that distract: thin lines in the backgrounds' colours
        draw.line(tuple(rng.integers(0, side, 4).tolist()), fill=BACKGROUNDS[choose(rng, BACKGROUNDS)], width=FINE)
    radius = SIZES[size] * side * rng.uniform(0.92, 1.08)
    shift = (side / 2 - radius) * 0.85
    x, y = (side / 2 + step * shift + rng.uniform(-2, 2) for step in PLACES[place])
    stencil = Image.new("L", (side, side))
    draw_shape(ImageDraw.Draw(stencil), shape, x, y, radius, rng.uniform(-0.3, 0.3))
    tint = np.array(COLOURS[colour]) + rng.normal(0, 8, 3)
    paint = np.empty((side, side, 3))
    paint[:] = tint
    rows, columns = np.mgrid[:side, :side]
    period = 5 * FINE
    dark = {
        "plain": np.zeros((side, side), bool),
        "striped": (rows + columns) % period < period * 0.35,
        "dotted": (rows % period - period / 2) ** 2 + (columns % period - period / 2) ** 2 < (period * 0.28) ** 2,
        "hatched": (rows % period < FINE) | (columns % period < FINE),
    }[texture]
    paint[dark] *= 0.62
    canvas.paste(Image.fromarray(paint.clip(0, 255).astype(np.uint8)), mask=stencil)
    return canvas.resize((SIZE, SIZE), Image.Resampling.BOX)


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, turn: float) -> None:
    """Fill `shape` of `radius` around (x, y), turned by `turn` radians, with 255."""

    def ring(count: int, start: float, inner: float | None = None) -> list[tuple[float, float]]:
        radii = [radius, inner * radius] if inner else [radius]
        steps = count * len(radii)
        return [
            (
                x + radii[i % len(radii)] * math.cos(start + turn + 2 * math.pi * i / steps),
                y + radii[i % len(radii)] * math.sin(start + turn + 2 * math.pi * i / steps),
            )
            for i in range(steps)
        ]

    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    elif shape == "ring":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        hole = radius * 0.52
        draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    elif shape == "square":
        draw.polygon(ring(4, math.pi / 4), fill=255)
    elif shape == "triangle":
        draw.polygon(ring(3, -math.pi / 2), fill=255)
    elif shape == "star":
        draw.polygon(ring(5, -math.pi / 2, 0.42), fill=255)
    elif shape == "cross":
        thick = radius * 0.34
        for a, b in ((radius, thick), (thick, radius)):
            corners = [(-a, -b), (a, -b), (a, b), (-a, b)]
            draw.polygon(
                [
                    (x + u * math.cos(turn) - v * math.sin(turn), y + u * math.sin(turn) + v * math.cos(turn))
                    for u, v in corners
                ],
                fill=255,
            )
    else:
        raise ValueError(shape)
