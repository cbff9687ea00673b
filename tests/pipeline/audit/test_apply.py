"""A mask is applied to the shards it was made of, byte for byte; other shards and damaged masks are refused by name."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.audit.apply import apply_mask, filter_shard
from pipeline.audit.files import members, output
from shards.errors import UserError
from shards.index import tar
from shards.index.build_index import build_index
from shards.order.safe_mask import IsSafe, SavedMask, fingerprint
from shards.order.shard_names import COLUMNS
from shards.storage.columns import record_batch
from tests.helpers.saved_masks import (
    ALL,
    NAMES,
    changed,
    cosines,
    make_tar,
    refused,
    run,
    safe_samples,
    samples,
    save_mask,
)
from tests.helpers.tars import write_tar


@pytest.mark.parametrize("keep", ["safe", "risky"])
def test_apply_keeps_every_member_of_the_kept_samples(here, capsys, keep):
    code, text, _ = run(capsys, "mask", "apply", "masks/one", *ALL, "--out", "out", "--keep", keep)
    assert code == 0 and f"20 {keep} of 40 samples in 4 shards" in text
    assert samples(here / "out" / name for name in NAMES) == safe_samples(here, keep == "safe")
    for name in NAMES:  # headers too: times, owners and modes are those of the original
        original = {m.name: m.get_info() for m in tarfile.open(f"data/{name}")}
        assert all(original[m.name] == m.get_info() for m in tarfile.open(f"out/{name}"))
    sizes = json.loads(Path("out/a/sizes.json").read_text())
    assert sizes == {f"0000{n}.tar": len(samples([here / f"out/a/0000{n}.tar"])) for n in range(3)}


def test_a_mask_that_keeps_no_pair_is_refused_before_anything_is_copied(here, capsys):
    index = build_index([f"data/{name}" for name in NAMES], here / "index")
    save_mask(here / "masks" / "whole", index, np.linspace(0, 1, 40, dtype=np.float32), fraction=1.0)
    words = ("mask", "apply", "masks/whole", *ALL, "--out", "out", "--keep", "risky")
    assert "has no risky pair" in refused(capsys, *words) and not Path("out").exists()


def test_apply_resumes_with_the_shards_that_are_missing(here, capsys):
    run(capsys, "mask", "apply", "masks/one", ALL[0], "--out", "out")
    first = Path("out/a/00000.tar").stat()
    run(capsys, "mask", "apply", "masks/one", *ALL, "--out", "out")
    assert Path("out/a/00000.tar").stat().st_mtime_ns == first.st_mtime_ns and Path("out/b/00000.tar").exists()
    assert not list(here.glob("out/**/*.part"))
    for mask, keep in (("masks/one", "risky"), ("masks/two", "safe")):
        assert "name another" in refused(capsys, "mask", "apply", mask, *ALL, "--out", "out", "--keep", keep)
    assert "name another" in refused(capsys, "mask", "apply", "masks/one", *ALL, "--out", "data")


entry = st.tuples(st.sampled_from(["png", "txt", "json", "a.b.C"]), st.binary(max_size=1100))


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.lists(entry, min_size=1, max_size=3, unique_by=lambda e: e[0]), st.booleans()), max_size=8),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    st.sampled_from(["k", "folder.d/k", "ключ/ü", "long/" + "x" * 180]),
)
def test_any_shard_is_filtered_byte_for_byte(tmp_path_factory, content, form, key):
    folder = tmp_path_factory.mktemp("filter")
    entries = [(f"{key}{i}.{ext}", data) for i, (group, _) in enumerate(content) for ext, data in group]
    path = write_tar(folder / "a.tar", entries, form)
    filter_shard(path, fingerprint(path), np.array([keep for _, keep in content], bool), folder / "b.tar")
    left = [(f"{key}{i}.{ext}", data) for i, (group, keep) in enumerate(content) if keep for ext, data in group]
    with tarfile.open(folder / "b.tar") as tar:
        assert [(m.name, tar.extractfile(m).read()) for m in tar] == left
    assert len(members(folder / "b.tar", fingerprint(folder / "b.tar"))) == len(left)
    assert (folder / "b.tar").stat().st_size % 10_240 == 0


# other shards, and damage


@pytest.mark.parametrize("harm", [changed, lambda path: make_tar(Path(path), 9, 2), os.unlink])
def test_a_shard_that_is_not_the_masks_is_refused_by_name(here, capsys, harm):
    harm("data/b/00000.tar")
    assert "data/b/00000.tar" in refused(capsys, "mask", "apply", "masks/one", *ALL, "--out", "out")
    assert not Path("out/b/00000.tar").exists()
    words = ["mask", "export", "masks/one", "--format", "datacomp", "--out", "u.npy", "--shards", *ALL]
    assert "data/b/00000.tar" in refused(capsys, *words) and not Path("u.npy").exists()
    if Path("data/b/00000.tar").exists():
        with pytest.raises(UserError, match="data/b/00000.tar: has fingerprint"):
            list(wds.WebDataset(["data/b/00000.tar"], shardshuffle=False).select(IsSafe("masks/one")))


def test_shards_of_other_names_are_refused(here, capsys):
    shutil.copy("data/b/00000.tar", "elsewhere.tar")
    assert "elsewhere.tar: not one of the 4" in refused(
        capsys, "mask", "apply", "masks/one", "elsewhere.tar", "--out", "o"
    )
    shutil.copytree("data", "again")
    words = ["mask", "apply", "masks/one", "data/b/00000.tar", "again/b/00000.tar", "--out", "o"]
    assert "name one" in refused(capsys, *words)
    assert "datacomp" in refused(
        capsys, "mask", "export", "masks/one", "--format", "csv", "--out", "o", "--shards", *ALL
    )


@pytest.mark.parametrize(
    "harm, names",
    [
        (lambda mask: (mask / "scores" / "00002.parquet").unlink(), "00002.parquet"),
        (
            lambda mask: shutil.copy(mask / "scores" / "00003.parquet", mask / "scores" / "00002.parquet"),
            "00002.parquet",
        ),
        (lambda mask: shutil.copy(mask.parent / "two/scores/00002.parquet", mask / "scores"), "step 40"),
        (lambda mask: (mask / "safe.npy").unlink(), "safe.npy"),
        (lambda mask: rewrite(mask, lambda meta: meta.pop("threshold")), "threshold"),
        (lambda mask: rewrite(mask, lambda meta: meta.update(shards=3)), "expected 3"),
        (lambda mask: rename(mask, "../../x.tar"), "below one folder"),
        (lambda mask: rename(mask, "/etc/x.tar"), "below one folder"),
        (lambda mask: rename(mask, "a/00001.tar"), "below one folder"),
        (lambda mask: next(mask.glob("shards_*.arrow")).unlink(), "shards_"),
    ],
)
def test_a_damaged_mask_is_refused_by_name(here, capsys, harm, names):
    harm(here / "masks" / "one")
    assert names in refused(capsys, "mask", "show", "masks/one")
    assert names in refused(capsys, "mask", "export", "masks/one", "--format", "parquet", "--out", "m.parquet")
    assert not list(here.glob("*m.parquet*"))


def rename(mask, name):
    """Another name for the first shard, in columns that are whole."""
    saved = SavedMask(mask)
    shards = [saved.shards[0] | {"name": name}, *saved.shards[1:]]
    columns = {key: [shard[key] for shard in shards] for key in COLUMNS}
    saved.mask.save(mask, saved.meta, record_batch(COLUMNS, columns))


def rewrite(mask, change):
    meta = json.loads((mask / "mask.json").read_text())
    change(meta)
    (mask / "mask.json").write_text(json.dumps(meta))


def test_a_file_that_was_cut_off_is_absent(tmp_path):
    with pytest.raises(KeyboardInterrupt), output(tmp_path / "a") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="Is a directory"), output(tmp_path):
        pass


def test_a_filtered_copy_of_a_damaged_shard_is_sound(tmp_path):
    path = tmp_path / "d" / "00000.tar"
    make_tar(path, 0, 12)
    everything = {key: found for _, key, found in samples([path])}
    data = bytearray(path.read_bytes())
    with open(path, "rb") as file:
        walk = list(tar.members(tar.Stream(file), None, print))
    corrupt = next(member for member in walk if member.name == "d/0_004.png")
    data[corrupt.start + 3] ^= 0xFF
    path.write_bytes(data[: walk[-4].offset + 10])  # and cut in the last sample
    index = build_index([str(path)], tmp_path / "index", report=tmp_path / "report.jsonl")
    cos = cosines(index.samples)
    selected = save_mask(tmp_path / "mask", index, cos, fraction=0.5)
    for keep in ("safe", "risky"):
        apply_mask(tmp_path / "mask", [str(path)], tmp_path / keep, keep)
        copied = build_index([str(tmp_path / keep / "00000.tar")], tmp_path / f"{keep}_index")  # no damage any more
        flags = selected.mask.flags() if keep == "safe" else ~selected.mask.flags()
        expected = [key for key, flag in zip(index.table(0).keys, flags) if flag]
        assert copied.table(0).keys == expected
        for _, key, found in samples([tmp_path / keep / "00000.tar"]):
            assert found.items() <= everything[key].items() and found
