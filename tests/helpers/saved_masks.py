"""Masks as a run leaves them, and their shards, for the tests of those who use them without the run."""

import json
from pathlib import Path

import numpy as np
import webdataset as wds

from pipeline.cli import main as cli
from pipeline.config.schema import Selection
from pipeline.safety.round import save_round, select_pairs
from pipeline.safety.score_files import ScoreFiles
from shards.order.safe_mask import SavedMask
from tests.helpers.pictures import picture
from tests.helpers.tars import write_tar

NAMES = ["a/00000.tar", "a/00001.tar", "a/00002.tar", "b/00000.tar"]  # base names repeat, and one shard is empty
ALL = ["data/a/{00000..00002}.tar", "data/b/00000.tar"]  # the same, as one types them


def save_mask(folder, index, cos_N, fraction=0.5, step=30, bad=()):
    """A mask's folder as a run leaves it, from given cosines; `bad`: [(shard, position, key, reason)]."""
    files = ScoreFiles(folder / "scores", index, step)
    files.claim()
    for shard, count in enumerate(index.counts):
        if count:
            here = cos_N[index.offsets[shard] : index.offsets[shard + 1]]
            files.write(shard, here, {position: reason for number, position, _, reason in bad if number == shard})
    selected = select_pairs(cos_N, index.counts, Selection(first_fraction=fraction, max_fraction=1.0), 0)
    save_round(folder, selected, index, {"epoch": 3, "step": step, "config": "0123456789ab"})
    return selected


def cosines(count, seed=0):
    rng = np.random.default_rng(seed)
    low = rng.random(count) < 0.4
    return np.where(low, rng.normal(0.05, 0.05, count), rng.normal(0.3, 0.05, count)).astype(np.float32)


def make_tar(path, shard, count):
    entries = []
    for i in range(count):
        key = f"d/{shard}_{i:03d}"
        entries += [(f"{key}.png", picture([shard, i])), (f"{key}.txt", f"caption {i} of {shard}".encode())]
        entries += [(f"{key}.json", json.dumps({"uid": f"{shard * 1000 + i:032x}", "n": i}).encode())]
        entries += [(f"{key}.Seg.BIN", bytes([i] * (i * 37 % 1500)))] if i % 3 == 0 else []
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_tar(path, entries + [("README", b"of no sample")])


def changed(path):
    """One bit of the shard's last picture changes; its size stays."""
    data = bytearray(Path(path).read_bytes())
    data[data.rindex(b"IEND")] ^= 1
    Path(path).write_bytes(data)


def samples(urls):
    """[(shard, key, {extension: bytes})] as webdataset reads them."""
    read = wds.WebDataset([str(url) for url in urls], shardshuffle=False, empty_check=False)
    return [
        ("/".join(Path(s["__url__"]).parts[-2:]), s["__key__"], {k: v for k, v in s.items() if k[:2] != "__"})
        for s in read
    ]


def safe_samples(folder, keep=True):
    flags = SavedMask(folder / "masks" / "one").mask.flags()
    return [s for s, flag in zip(samples(folder / "data" / name for name in NAMES), flags) if flag == keep]


def run(capsys, *words):
    """(exit code, stdout, stderr) of the command line."""
    try:
        cli.main([str(word) for word in words])
        code = 0
    except SystemExit as end:
        code = end.code or 0
    return code, *capsys.readouterr()


def refused(capsys, *words):
    """The one line with which the command line refuses."""
    code, _, error = run(capsys, *words)
    assert code == 2 and error.count("\n") == 1 and "Traceback" not in error, error
    return error
