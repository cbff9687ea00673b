"""The readers of others take a mask as it is: webdataset and open_clip train on the safe pairs without a copy of the
data."""

import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import pytest
import webdataset

from shards.errors import UserError
from shards.index.build_index import build_index
from shards.index.tar import key_of
from shards.order.safe_mask import IsSafe, SavedMask
from tests.helpers.saved_masks import changed, cosines, safe_samples, save_mask

ROOT = Path(__file__).parents[3]


def shown(heading):
    """The code that the audit's README shows first under a heading."""
    lines = (ROOT / "pipeline" / "audit" / "README.md").read_text().split(f"### {heading}\n")[1].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("    "))
    code = itertools.takewhile(lambda line: not line or line.startswith("    "), lines[start:])
    return textwrap.dedent("\n".join(code))


def test_webdataset_reads_the_safe_pairs_of_the_readme_in_place(here):
    names = {"/data/cc3m/{00000..00331}.tar": "data/a/{00000..00002}.tar", "runs/cc3m/masks/epoch_015": "masks/one"}
    text = shown("webdataset")
    for there, name in names.items():
        assert there in text
        text = text.replace(there, name)
    scope = {}
    exec(text, scope)
    pairs = list(scope["pairs"])
    wanted = [members["txt"].decode() for shard, _, members in safe_samples(here) if shard.startswith("a/")]
    assert sorted(caption for _, caption in pairs) == sorted(wanted)
    assert {picture.size for picture, _ in pairs} == {(16, 16)}


def test_shards_are_told_apart_by_their_folders(here):
    """a/00000.tar and b/00000.tar; each under the paths and URLs that webdataset takes."""
    saved = SavedMask("masks/one")
    for url, number in {
        "/x/y/a/00000.tar": 0,
        "b/00000.tar": 3,
        "/moved/00002.tar": 2,  # no other shard has this base name
        "file:/x/b/00000.tar": 3,
        "https://h/x/b/00000.tar?key=a/00002.tar": 3,
        "pipe:aws s3 cp 's3://bucket/a/00000.tar' - || true": 0,
    }.items():
        assert saved.find(url) == number
    for url in ("/x/00000.tar", "/x/a/00009.tar", "00000"):
        with pytest.raises(UserError, match=url):
            saved.find(url)


def test_a_shard_is_trusted_without_its_content_only_when_told_so(here):
    safe = IsSafe("masks/one")
    sample = {"__url__": "https://h/b/00000.tar", "__key__": "d/3_000"}
    with pytest.raises(UserError, match="verify=False"):
        safe(sample)
    flags = [IsSafe("masks/one", verify=False)({**sample, "__key__": f"d/3_{i:03d}"}) for i in range(13)]
    assert flags == SavedMask("masks/one").mask.shard_flags(3).tolist()
    with pytest.raises(UserError, match="'nobody'"):
        IsSafe("masks/one", verify=False)({**sample, "__key__": "nobody"})
    shutil.copytree("data", "other")
    changed("other/b/00000.tar")
    assert safe({**sample, "__url__": "data/b/00000.tar"}) in (True, False)
    with pytest.raises(UserError, match="other/b/00000.tar: has fingerprint"):  # the same name at another place
        safe({**sample, "__url__": "other/b/00000.tar"})


def test_open_clip_trains_on_the_safe_pairs_in_place(here):
    """The documented script with the real open_clip_train: two epochs on the CPU; what it read is noted behind the
    mask."""
    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (here / "tiny").mkdir()
    (here / "tiny" / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    (here / "train_safe.py").write_text(shown("open_clip"))
    (here / "noting.py").write_text(
        "import runpy, sys\n"
        "from open_clip_train import data\n"
        "usable = data.filter_no_caption_or_no_image\n"
        "def noting(sample):\n"
        "    print('READ', sample['__key__'])\n"
        "    return usable(sample)\n"
        "data.filter_no_caption_or_no_image = noting\n"
        "runpy.run_path('train_safe.py', run_name='__main__')\n"
    )

    wanted = {key for shard, key, _ in safe_samples(here) if shard == "a/00000.tar"}
    count = len(wanted) // 2 * 2

    def train(mask):
        words = (
            f"noting.py {mask} --train-data data/a/00000.tar --train-num-samples {count} "
            "--dataset-type webdataset --workers 0"
        )
        words += " --batch-size 2 --epochs 2 --warmup 1 --model local-dir:tiny --logs logs --device cpu"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [sys.executable, *words.split()], capture_output=True, text=True, cwd=here, env=env, timeout=300
        )

    done = train("masks/one")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Train Epoch: 1 [{count}/{count} (100%)]" in done.stderr
    read = re.findall(r"READ (\S+)", done.stdout)  # open_clip draws them from a shuffle without a seed
    assert set(read) <= wanted and len(set(read)) >= count and len(read) >= 2 * count
    changed("data/a/00000.tar")
    done = train("masks/one")
    assert done.returncode != 0 and "data/a/00000.tar: has fingerprint" in done.stderr


def test_names_that_differ_only_in_bytes_that_are_no_utf8_stay_apart(tmp_path):
    names = [f"{name}{i}" for i, name in enumerate(("a", "a\udce9", "a\udcea", "é", "b\\xe9"))]
    names += ["c\udce9", "c\udcea", "c\\xe9"]
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as file:
        for name in names:
            for extension, data in (("png", b"1"), ("txt", b"a dog")):
                member = tarfile.TarInfo(f"{name}.{extension}")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    index = build_index([str(tmp_path / "a.tar")], tmp_path / "index")
    keys = index.table(0).keys
    assert len(set(keys)) == len(names) and [key_of(key) for key in keys] == names
    save_mask(tmp_path / "mask", index, cosines(len(names)))
    flags = SavedMask(tmp_path / "mask").mask.shard_flags(0).tolist()
    is_safe, samples = IsSafe(tmp_path / "mask"), webdataset.WebDataset([str(tmp_path / "a.tar")], shardshuffle=False)
    assert [is_safe(sample) for sample in samples] == flags and len(set(flags)) == 2
