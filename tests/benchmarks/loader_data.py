"""The shards that tests/benchmarks/loader.py reads, made once: rendered shapes at 32 px, textures as JPEG, and 100,000
small pairs."""

import io
import json
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

from shards.build.shapes import render
from shards.build.write import write_shards
from shards.index.build_index import build_index

WORDS = (
    "a photo of the person in front blue sky and water at sunset with old stone bridge over river people walking dog "
    "on beach actor attends premiere football player celebrates goal during match city skyline "
    "mountains winter snow tree house"
).split()


def texture(rng, width, height):
    """PIL RGB: noise whose spectrum falls as that of photographs does."""
    pixels = np.zeros((height, width, 3), np.float32)
    for octave in range(1, 10):
        cells = 2**octave
        coarse = rng.normal(size=(max(2, cells * height // width), cells, 3)).astype(np.float32) / 1.55**octave
        planes = [Image.fromarray(coarse[..., c]).resize((width, height), Image.BICUBIC) for c in range(3)]
        pixels += np.stack([np.asarray(plane) for plane in planes], -1)
    low, high = np.percentile(pixels, (1, 99))
    return Image.fromarray(((pixels - low) / (high - low) * 255).clip(0, 255).astype(np.uint8))


def jpegs(count=400):
    """[bytes]: pictures of 256 to 512 pixels a side, as CC3M's come out of img2dataset, about 30 KB each."""
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        file = io.BytesIO()
        width, height = (int(side) for side in rng.integers(256, 513, 2))
        texture(rng, width, height).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def pairs(kind, pictures, count):
    """`count` samples; captions of 5 to 15 words."""
    rng = np.random.default_rng(1)
    for number in range(count):
        caption = " ".join(rng.choice(WORDS, rng.integers(5, 16)))
        yield {"__key__": f"{number:06d}", kind: pictures[number % len(pictures)], "txt": caption}


def data_sets(folder, energon=None):
    """{32: folder, 224: folder, "large": folder}, each with tars/ and index/, prepared for energon where its Python is
    given."""
    shapes = [render(number, 0) for number in range(2000)]
    small = [sample["png"] for sample in shapes]
    wanted = {32: ("png", lambda: small, 16_000), 224: ("jpg", jpegs, 4_000), "large": ("png", lambda: small, 100_000)}
    for name, (kind, pictures, count) in wanted.items():
        tars = folder / str(name) / "tars"
        if not (folder / str(name) / "index" / "index.json").exists():
            paths = write_shards(pairs(kind, pictures(), count), tars, 1000)
            build_index([str(path) for path in paths], folder / str(name) / "index")
        if energon and name != "large" and not (tars / ".nv-meta" / "dataset.yaml").exists():
            program = [Path(energon).with_name("energon"), "prepare", tars, "--non-interactive", "--num-workers", "1"]
            program += ["--split-parts", "train:.*", "--sample-type", "CaptioningSample"]
            fields = json.dumps({"image": kind, "caption": "txt"})
            subprocess.run([*map(str, program), "--field-map", fields, "--force-overwrite"], check=True)
    return {name: folder / str(name) for name in wanted}
