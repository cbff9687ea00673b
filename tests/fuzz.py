"""Feed mutated tars, pictures and captions to everything that reads them: nothing may crash, hang, or take more memory
than allowed.

python -m tests.fuzz [--items 24000] [--seed 0] [--workers 2] [--seconds 10] [--megabytes 1024]

Each item is a pure function of (seed, number). Worker processes work through them under a limit of address space (what
they have at their start and --megabytes more) and an alarm of --seconds an item. A worker that dies, an item that
hangs, runs out of memory or raises anything but BadSample or UserError is a finding; exit code 1 if there is any. Last
line: one JSON object of counts.
"""

import argparse
import io
import json
import multiprocessing
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from shards.errors import BadSample, UserError
from shards.index.build_index import build_index
from shards.samples.decode import Limits, decode_caption, decode_image
from shards.samples.samples import Samples
from shards.views.augment import ImageAugment, image_view, plain_view, sample_rng
from shards.views.eda import Eda

LIMITS = Limits(max_bytes=1_000_000, max_pixels=4_000_000, max_caption=2_000)
EDA = (Eda(), Eda(clean=False))
KINDS = ("picture", "picture", "picture", "caption", "tar", "tar")
TEXT = (
    "a red dog",
    "&amp;lt;",
    "<start_of_text>",
    "schÃ¶n",
    "日本",
    "e\u0301",
    "\u202e",
    "\x1b[31m",
    "\r\n",
    "\0",
    "'s",
    "🙂",
    "1,5 %",
)


def pictures():
    """[bytes]: one of every form, mode and trait that the decoder knows."""
    rng, found = np.random.default_rng(0), []
    noise = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "described"
    forms = [
        *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        *(("JPEG", mode, options) for mode in ("L", "RGB", "CMYK") for options in ({}, {"progressive": True})),
        *(("WEBP", mode, options) for mode in ("RGB", "RGBA") for options in ({}, {"lossless": True})),
        *((form, "RGB", {"exif": exif, "icc_profile": bytes(200)}) for form in ("PNG", "JPEG", "WEBP")),
        *((form, "RGB", {"save_all": True, "append_images": [noise]}) for form in ("PNG", "GIF", "WEBP")),
        ("GIF", "P", {"transparency": 3}),
        ("MPO", "RGB", {"save_all": True, "append_images": [noise]}),
    ]
    for form, mode, options in forms:
        file = io.BytesIO()
        image = Image.new("I;16", (32, 24), 999) if mode == "I;16" else noise.convert(mode)
        image.save(file, form, **options)
        found.append(file.getvalue())
    return found


def mutated(data, rng, others):
    """`data` with one to six changes: bytes, bits, numbers at their edges, pieces cut, doubled, or taken from another
    file."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 7)):
        if not data:
            break
        at, length = int(rng.integers(len(data))), int(rng.integers(1, 65))
        change = rng.integers(8)
        if change == 0:
            data[at] = int(rng.integers(256))
        elif change == 1:
            data[at] ^= 1 << int(rng.integers(8))
        elif change == 2:
            edge = int(rng.choice([0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]))
            data[at : at + 4] = struct.pack(rng.choice([">I", "<I"]), edge)
        elif change == 3:
            del data[at : at + length]
        elif change == 4:
            data[at:at] = data[at : at + length] * int(rng.integers(1, 50))
        elif change == 5:
            del data[at:]
        elif change == 6:
            other = others[rng.integers(len(others))]
            start = int(rng.integers(len(other)))
            data[at : at + length] = other[start : start + length]
        else:
            data[at : at + length] = rng.bytes(length)
    return bytes(data)


def tar(rng, seeds):
    """bytes of a small tar of samples, some of them mutated, in the plain, GNU or PAX form."""
    file = io.BytesIO()
    form = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[rng.integers(3)]
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for number in range(rng.integers(1, 5)):
            name = str(rng.choice(["a", "b.c", "d/e", "x" * 120, "ü", "../up", "/root"])) + str(number % 3)
            picture = seeds[rng.integers(len(seeds))]
            for extension, data in ((str(rng.choice(["jpg", "png", "webp"])), picture), ("txt", "a dog".encode())):
                if form == tarfile.USTAR_FORMAT and len(name) > 90:
                    name = name[:80]
                member = tarfile.TarInfo(f"{name}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def use_picture(data, rng):
    image = decode_image(data, LIMITS, least=[None, 8][rng.integers(2)])
    assert image.dtype == np.uint8 and image.shape[2:] == (3,)
    assert image_view(image, 16, rng, ImageAugment()).shape == plain_view(image, 16).shape == (16, 16, 3)


def use_caption(data, rng, tokenize):
    caption = decode_caption(data, LIMITS)
    views = [eda(caption, rng) for eda in EDA]
    assert caption and all(view.strip() for view in views)
    assert tokenize([caption, *views]).shape == (3, 77)


def use_tar(data, folder):
    path = folder / "fuzz.tar"
    path.write_bytes(data)
    samples = Samples(build_index([str(path)], folder / "index"), limits=LIMITS)
    for position in range(samples.index.samples):
        for read in (samples.image, samples.caption):
            try:
                read(0, position)
            except BadSample:
                pass


def make(seed, number, seeds):
    """(kind, data, rng) of an item."""
    rng = sample_rng(seed, 0, 0, number, 0)
    kind = KINDS[number % len(KINDS)]
    if kind == "picture":
        data = mutated(seeds[rng.integers(len(seeds))], rng, seeds)
    elif kind == "tar":
        data = tar(rng, seeds)
        data = mutated(data, rng, [data]) if rng.random() < 0.9 else data
    else:
        words = "".join(TEXT[i] for i in rng.integers(len(TEXT), size=rng.integers(1, 40)))
        data = words.encode()
        data = mutated(data, rng, [word.encode() for word in TEXT]) if rng.random() < 0.5 else data
    return kind, data, rng


def use(kind, data, rng, folder, tokenize):
    """ "used" or "refused". Raises what should not be raised."""
    try:
        if kind == "picture":
            use_picture(data, rng)
        elif kind == "caption":
            use_caption(data, rng, tokenize)
        else:
            use_tar(data, folder)
    except (BadSample, UserError) as error:
        assert "\n" not in str(error)
        return "refused"
    return "used"


class Hang(BaseException):
    pass


def hang(*_):
    raise Hang


def work(seed, numbers, seconds, megabytes, started, done):
    """One worker: items `numbers`; tells before each which one it is, and at the end the counts."""
    from pipeline.training.tokens import Tokenizer

    tokenize, seeds, counts, findings = Tokenizer(), pictures(), Counter(), []
    tokenize(["warm"])
    plain_view(Image.new("RGB", (200, 200)), 16)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (megabytes << 20),) * 2)
    signal.signal(signal.SIGALRM, hang)
    before, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
    for number in numbers:
        with tempfile.TemporaryDirectory() as folder:  # one for each: an index is remembered by its folder
            started.value = number
            kind, data, rng = make(seed, number, seeds)
            signal.alarm(seconds)
            began = time.monotonic()
            try:
                counts[f"{kind} {use(kind, data, rng, Path(folder), tokenize)}"] += 1
            except Hang:
                findings.append((number, kind, "hang"))
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                findings.append((number, kind, f"{type(error).__name__} at {last.filename}:{last.lineno}: {error}"))
            finally:
                signal.alarm(0)
            slowest = max(slowest, time.monotonic() - began)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    done.put((counts, findings, slowest, grown))


def fuzz(items, seed=0, workers=2, seconds=10, megabytes=1024):
    """dict of counts and findings; every item is worked on, whatever becomes of the worker that had it."""
    context = multiprocessing.get_context("spawn")
    counts, findings, slowest, grown = Counter(), [], 0.0, 0
    parts = [list(range(items))[worker::workers] for worker in range(workers)]
    running = []

    def start(numbers):
        started, done = context.Value("q", -1), context.SimpleQueue()
        process = context.Process(target=work, args=(seed, numbers, seconds, megabytes, started, done))
        process.start()
        running.append((process, numbers, started, done))

    for part in parts:
        start(part)
    while running:
        for entry in list(running):
            process, numbers, started, done = entry
            if not done.empty():
                result = done.get()
                counts += result[0]
                findings += result[1]
                slowest, grown = max(slowest, result[2]), max(grown, result[3])
                process.join()
                running.remove(entry)
            elif not process.is_alive() and done.empty():
                at = started.value
                findings.append((at, KINDS[at % len(KINDS)], f"the process died with exit code {process.exitcode}"))
                running.remove(entry)
                start([number for number in numbers if number > at])
        time.sleep(0.05)
    return {
        "items": items,
        "seed": seed,
        **dict(sorted(counts.items())),
        "findings": len(findings),
        "slowest_s": round(slowest, 2),
        "peak_megabytes_above_start": grown,
    }, sorted(findings)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=24_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=10, help="that an item may take")
    parser.add_argument(
        "--megabytes", type=int, default=1024, help="of memory that a worker may take on top of what it starts with"
    )
    args = parser.parse_args()
    figures, findings = fuzz(args.items, args.seed, args.workers, args.seconds, args.megabytes)
    for finding in findings[:50]:
        print(*finding)
    print(json.dumps(figures))
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
