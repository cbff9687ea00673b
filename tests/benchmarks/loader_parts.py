"""Where the loader's gain comes from, part by part, and the decoders to choose from. Needs the data of
tests/benchmarks/loader.py.

python -m tests.benchmarks.loader_parts [--dir runs/loader] [--rounds 7]

Last line: one JSON object, microseconds of processor time a sample, the least median of the rounds: what open_clip's
training loader does and what ours does in its place. decoders: the same JPEGs to RGB by each library that can be
imported, whether the pixels are Pillow's, and pictures/s of two threads over those of one and of two processes over
those of one.
"""

import argparse
import io
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import open_clip
import torch
import webdataset
from PIL import Image
from torchvision.transforms import ColorJitter, InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from pipeline.training.model import pixel_stats
from pipeline.training.tokens import Tokenizer
from shards.index.shard_index import ShardIndex
from shards.samples.decode import decode_image
from shards.samples.samples import Samples
from shards.views.augment import draw_jitter, image_view, jittered, random_box, resized
from tests.benchmarks.loader_sides import JITTER, our_augment

SAMPLES = 400


def by_pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def by_torchvision(data):
    from torchvision.io import decode_jpeg

    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8)).permute(1, 2, 0).numpy()


def by_simplejpeg(data):
    import simplejpeg

    return simplejpeg.decode_jpeg(data, "RGB")


def by_spdl(data):
    import spdl.io

    frames = spdl.io.decode_packets(
        spdl.io.demux_image(data), filter_desc=spdl.io.get_video_filter_desc(pix_fmt="rgb24")
    )
    return spdl.io.to_numpy(spdl.io.convert_frames(frames))


DECODERS = {"pillow": by_pillow, "torchvision": by_torchvision, "simplejpeg": by_simplejpeg, "spdl": by_spdl}


def measure(ways, rounds):
    """{name: microseconds an item}: the ways are (function, items), taken in turn."""
    found = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (function, items) in ways.items():
            times = []
            for item in items:
                started = time.process_time()
                function(item)
                times.append((time.process_time() - started) * 1e6)
            found[name].append(statistics.median(times))
    return {name: round(min(values), 1) for name, values in found.items()}


def parts(folder, size, rounds):
    """{part: {"theirs", "ours"}} for the pictures in `folder`."""
    index = ShardIndex.load(folder / "index")
    samples, rng, numbers = Samples(index), np.random.default_rng(0), range(SAMPLES)
    data = [samples.reader.image_bytes(0, n) for n in numbers]
    captions = [samples.caption(0, n) for n in numbers]
    images = [decode_image(one) for one in data]
    mean, std = pixel_stats()
    pixels = [image_view(image, size, rng, our_augment(False)) for image in images]
    small = [Image.fromarray(np.ascontiguousarray(one)) for one in pixels]
    crop = RandomResizedCrop(size, (0.9, 1.0), interpolation=InterpolationMode.BICUBIC)
    colours = our_augment(True)
    theirs, ours = open_clip.SimpleTokenizer(), Tokenizer()
    room = np.zeros((SAMPLES, 3, size, size), np.uint8)
    stream = iter(webdataset.WebDataset([index.shards[0].path], shardshuffle=False))

    def place(n):
        room[n] = pixels[n].transpose(2, 0, 1)

    ways = {
        "read theirs": (lambda _: next(stream), range(SAMPLES // rounds)),
        "read ours": (lambda n: (samples.reader.image_bytes(0, n), samples.reader.texts(0, n)[0]), numbers),
        "decode theirs": (by_pillow, data),
        "decode ours": (decode_image, data),
        "crop and resize theirs": (crop, [Image.fromarray(image) for image in images]),
        "crop and resize ours": (lambda image: resized(image, size, random_box(*image.shape[1::-1], 0.9, rng)), images),
        "colour theirs": (ColorJitter(*JITTER), small),
        "colour ours": (lambda image: jittered(image, draw_jitter(colours, rng)), small),
        "to the batch theirs": (
            lambda image: F.normalize(F.to_dtype(F.to_image(image), torch.float32, True), mean, std),
            small,
        ),
        "to the batch ours": (place, numbers),
        "tokens theirs": (lambda text: theirs(text)[0], captions),
        "tokens ours": (lambda text: ours([text]), captions),
    }
    found = measure(ways, rounds)
    names = dict.fromkeys(name.rsplit(" ", 1)[0] for name in found)
    return {name: {side: found[f"{name} {side}"] for side in ("theirs", "ours")} for name in names}


def decode_all(decoder, data):
    for one in data:
        DECODERS[decoder](one)


def in_parallel(pool, decoder, data, rounds):
    """Pictures/s of two workers of a pool over those of one, the median of the rounds."""
    ratios = []
    with pool(2) as workers:
        list(workers.map(decode_all, [decoder] * 2, [data[:10]] * 2))
        for _ in range(rounds):
            seconds = []
            for jobs in ([data], [data[::2], data[1::2]]):
                started = time.perf_counter()
                list(workers.map(decode_all, [decoder] * len(jobs), jobs))
                seconds.append(time.perf_counter() - started)
            ratios.append(seconds[0] / seconds[1])
    return round(statistics.median(ratios), 2)


def decoders(folder, rounds):
    index = ShardIndex.load(folder / "index")
    data = [Samples(index).reader.image_bytes(0, n) for n in range(SAMPLES)]
    there, found = {}, {}
    for name, function in DECODERS.items():
        try:
            same = all(np.array_equal(function(one), by_pillow(one)) for one in data[:50])
            there[name], found[name] = function, {"same_pixels": same}
        except (ImportError, RuntimeError) as error:
            found[name] = {"missing": str(error).splitlines()[0][:80]}
    us = measure({name: (function, data) for name, function in there.items()}, rounds)
    for name in there:
        found[name]["us"] = us[name]
        found[name]["two_threads_over_one"] = in_parallel(ThreadPoolExecutor, name, data, rounds)
        found[name]["two_processes_over_one"] = in_parallel(ProcessPoolExecutor, name, data, rounds)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/loader"))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures = {f"{size}_px": parts(args.dir / str(size), size, args.rounds) for size in (32, 224)}
    figures["decoders"] = decoders(args.dir / "224", args.rounds)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
