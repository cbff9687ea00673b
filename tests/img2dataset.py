"""The real img2dataset, in a virtual environment of its own: its shards are indexed and read as it wrote them, and what
is lost is listed.

python -m tests.img2dataset [--dir runs/img2dataset]      1 minute after the first time; needs the package registry then

Pictures are served on loopback; some are missing, some are no pictures. Recorded beside, in tests/img2dataset.json.
"""

import argparse
import csv
import functools
import io
import json
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import webdataset
from PIL import Image

from shards.index import tar
from shards.index.build_index import build_index
from shards.storage.reader import Reader

COUNT, PER_SHARD = 120, 40
KINDS = ("JPEG", "PNG", "WEBP")


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--dir", default="runs/img2dataset")
    folder = Path(options.parse_args().dir).absolute()
    rows = make_pictures(folder)
    python = install(folder / "venv")
    with serve(folder / "pictures") as address:
        download(python, folder, address, rows)
    paths = sorted(str(path) for path in (folder / "shards").glob("*.tar"))
    found = compare(folder, paths, rows)
    found["lost"] = cut(folder, paths[1])
    print(json.dumps(found))


def make_pictures(folder):
    """[(file name, caption or None where it cannot be downloaded)]"""
    shutil.rmtree(folder / "pictures", ignore_errors=True)
    (folder / "pictures").mkdir(parents=True)
    rows = []
    for number in range(COUNT):
        kind = KINDS[number % 3]
        name, caption = f"{number}.{kind.lower()}", f'number {number}, "größer", 文字'
        if number % 10 == 3:
            name, caption = f"missing{number}.jpg", None
        elif number % 10 == 7:
            (folder / "pictures" / name).write_bytes(b"no picture at all")
            caption = None
        else:
            pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / name, kind)
        rows.append((name, caption))
    return rows


def install(venv):
    """The interpreter of a virtual environment that has img2dataset."""
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        # setuptools: it asks pkg_resources for its own version.
        subprocess.run([python, "-m", "pip", "install", "--quiet", "img2dataset", "setuptools<81"], check=True)
    return python


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


class serve:
    """A folder behind http://127.0.0.1:PORT."""

    def __init__(self, folder):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *error):
        self.server.shutdown()


def download(python, folder, address, rows):
    shutil.rmtree(folder / "shards", ignore_errors=True)
    with open(folder / "list.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["url", "caption"])
        writer.writerows((f"{address}/{name}", caption or "none") for name, caption in rows)
    words = {
        "url_list": folder / "list.csv",
        "input_format": "csv",
        "url_col": "url",
        "caption_col": "caption",
        "output_format": "webdataset",
        "output_folder": folder / "shards",
        "number_sample_per_shard": PER_SHARD,
        "image_size": 32,
        "processes_count": 1,
        "thread_count": 4,
        "enable_wandb": False,
    }
    command = [python, "-c", "from img2dataset import main; main()"]
    subprocess.run(command + [f"--{key}={value}" for key, value in words.items()], check=True)


def compare(folder, paths, rows):
    """What the index and the reader find is what img2dataset's tables, webdataset, and the list itself say."""
    expected = [caption for _, caption in rows if caption]
    figures = {"pictures": len(rows), "downloadable": len(expected), "shards": len(paths)}
    theirs = list(webdataset.WebDataset(paths, shardshuffle=False))
    for text in ("txt", "json:caption"):
        index = build_index(paths, folder / f"index_{text[:4]}", text=text)
        reader, captions = Reader(index), []
        for shard in range(len(paths)):
            stats = json.loads(Path(paths[shard].replace(".tar", "_stats.json")).read_text())
            assert index.counts[shard] == stats["successes"], (index.counts[shard], stats)
            table = pq.read_table(paths[shard].replace(".tar", ".parquet")).to_pylist()
            successes = {row["key"]: row["caption"] for row in table if row["status"] == "success"}
            assert successes.keys() == set(index.table(shard).keys)
            for position, key in enumerate(index.table(shard).keys):
                picture, sample = reader.image_bytes(shard, position), theirs[len(captions)]
                captions.append(reader.texts(shard, position)[0].decode())
                assert (sample["__key__"], sample["jpg"], sample["txt"].decode()) == (key, picture, captions[-1])
                assert successes[key] == captions[-1] and Image.open(io.BytesIO(picture)).size == (32, 32)
        assert sorted(captions) == sorted(expected) and len(theirs) == len(expected) and not index.findings
        figures[f"read_{text}"] = len(captions)
    return figures


def cut(folder, path):
    """A shard cut at a member's end: webdataset loses the rest and says nothing, the report lists each sample that is
    lost."""
    damaged = folder / "cut" / Path(path).name
    damaged.parent.mkdir(exist_ok=True)
    shutil.copy(path.replace(".tar", ".parquet"), damaged.parent)
    whole = build_index([path], folder / "index_whole")
    first = whole.table(0).keys[len(whole.table(0).keys) // 2]  # of those that are cut off
    with open(path, "rb") as file:
        start = next(m.start for m in tar.members(tar.Stream(file), None, print) if m.name.startswith(first))
    damaged.write_bytes(Path(path).read_bytes()[:start])
    read = [sample["__key__"] for sample in webdataset.WebDataset([str(damaged)], shardshuffle=False)]
    report = folder / "report.jsonl"
    build_index([str(damaged)], folder / "index_cut", report=report)
    lost = [row["key"] for row in map(json.loads, report.read_text().splitlines()) if row["reason"].startswith("lost")]
    assert sorted(read + lost) == sorted(whole.table(0).keys) and lost
    return {"in_the_shard": len(whole.table(0).keys), "webdataset_reads": len(read), "listed_as_lost": len(lost)}


if __name__ == "__main__":
    main()
