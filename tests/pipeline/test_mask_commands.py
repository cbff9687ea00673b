"""A mask's folder and the shards are enough: shown, exported, compared, rebuilt and applied, or refused by name."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline import cli
from pipeline.audit.apply import filter_shard
from pipeline.audit.export import as_array, guarded, uid_of_key
from pipeline.audit.files import members, output
from pipeline.config import Selection
from pipeline.safety.scores import ScoreFiles
from pipeline.safety.split import save_split, split_pairs
from shards.errors import UserError
from shards.index import build_index
from shards.masks import IsSafe, SafeMask, SavedMask, fingerprint, shard_list
from tests.conftest import picture
from tests.shards.test_index import write_tar

ROOT = Path(__file__).parents[2]
NAMES = ["a/00000.tar", "a/00001.tar", "a/00002.tar", "b/00000.tar"]  # base names repeat, and one shard is empty

WEBDATASET = """
import webdataset as wds
from shards.masks import IsSafe

pairs = (
    wds.WebDataset("/data/cc3m/{00000..00331}.tar", shardshuffle=100)
    .select(IsSafe("runs/cc3m/masks/epoch_031"))
    .shuffle(5000)
    .decode("pil")
    .to_tuple("jpg;png;jpeg;webp", "txt")
)
""".strip()

OPEN_CLIP = """
import sys

import webdataset as wds
from open_clip_train import data, main
from shards.masks import IsSafe

is_safe, read = IsSafe(sys.argv[1]), wds.tarfile_to_samples()
data.tarfile_to_samples_nothrow = lambda shards: filter(is_safe, read(shards))  # what reads training shards, and no others
main.main(sys.argv[2:])
""".strip()


def save_mask(folder, index, cos_N, share=0.5, step=30, bad=()):
    """A mask's folder as a run leaves it, from given cosines; `bad`: [(shard, position, key, reason)]."""
    files = ScoreFiles(folder / "scores", index, step)
    for shard, count in enumerate(index.counts):
        if count:
            here = cos_N[index.offsets[shard] : index.offsets[shard + 1]]
            files.write(shard, here, [sample for sample in bad if sample[0] == shard])
    split = split_pairs(cos_N, index.counts, Selection(first_share=share, cap=1.0), 0)
    save_split(folder, split, index, {"epoch": 3, "step": step, "config": "0123456789ab"})
    return split


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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two masks of the same shards, apart from any run: data/ with NAMES, masks/one and masks/two."""
    folder = tmp_path_factory.mktemp("saved")
    for shard, (name, count) in enumerate(zip(NAMES, (20, 0, 7, 13))):
        make_tar(folder / "first" / name, shard, count)
    index = build_index([str(folder / "first" / name) for name in NAMES], folder / "index")
    cos = cosines(40)
    cos[[3, 25]] = np.nan
    bad = [(0, 3, "d/0_003", "no caption"), (2, 5, "d/2_005", "no picture")]
    save_mask(folder / "masks" / "one", index, cos, bad=bad)
    save_mask(folder / "masks" / "two", index, cosines(40, seed=1), 0.6, step=40)
    shutil.rmtree(folder / "index")
    (folder / "first").rename(folder / "data")  # the shards have moved since
    return folder


@pytest.fixture
def here(saved, tmp_path, monkeypatch):
    """A copy of `saved` to damage, as the working directory."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


ALL = ["data/a/{00000..00002}.tar", "data/b/00000.tar"]


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


# show


def test_show_says_what_a_mask_is(here, capsys):
    code, text, _ = run(capsys, "mask", "show", "masks/one")
    for part in (
        "before epoch 3",
        "step 30",
        "40 in 4 shards",
        "20 = 50.00%",
        "1 x no caption, 1 x no picture",
        "N(0.",
    ):
        assert part in text, text
    code, text, _ = run(capsys, "mask", "show", "masks/one", "--json")
    meta, shown = json.loads(Path("masks/one/mask.json").read_text()), json.loads(text)
    assert all(shown[key] == meta[key] for key in ("epoch", "step", "fingerprint", "share", "cut", "mixture", "config"))
    assert shown["pairs"] == 40 and shown["safe"] == 20 and shown["bad_pairs"] == {"no caption": 1, "no picture": 1}
    assert 0 <= shown["least_safe_shard"]["share"] <= shown["share"] <= shown["most_safe_shard"]["share"] <= 1


# export


def test_parquet_and_csv_hold_every_pair(here, capsys):
    saved = SavedMask("masks/one")
    for form in ("parquet", "csv"):
        assert run(capsys, "mask", "export", "masks/one", "--format", form, "--out", f"out/m.{form}")[0] == 0
    table = pq.read_table("out/m.parquet")
    assert table.column_names == ["shard", "position", "key", "cosine", "posterior", "safe", "score"]
    assert table["safe"].to_pylist() == saved.mask.flags().tolist()
    assert [f"{s}" for s in table["shard"].unique().to_pylist()] == [NAMES[0], NAMES[2], NAMES[3]]
    assert table["position"].to_pylist() == [*range(20), *range(7), *range(13)]
    assert table["cosine"].null_count == table["posterior"].null_count == 2
    cut = saved.meta["cut"]
    assert all(
        safe == (cos is not None and cos >= cut)
        for safe, cos in zip(*(table[c].to_pylist() for c in ("safe", "cosine")))
    )
    assert json.loads(table.schema.metadata[b"safeclip_mask"])["fingerprint"] == saved.meta["fingerprint"]
    with open("out/m.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["shard"], r["key"], r["safe"] == "true") for r in rows] == list(
        zip(*(table[c].to_pylist() for c in ("shard", "key", "safe")))
    )
    assert [np.float32(r["cosine"]) if r["cosine"] else None for r in rows] == table["cosine"].to_pylist()


def test_cleanlab_columns_rank_as_the_cut_does(here, capsys):
    assert run(capsys, "mask", "export", "masks/one", "--format", "cleanlab", "--out", "m.parquet")[0] == 0
    table = pq.read_table("m.parquet")
    issue, score = (np.array(table[c].to_pylist()) for c in ("is_poison_issue", "poison_score"))
    assert table.column_names[:2] == ["is_poison_issue", "poison_score"]
    assert np.array_equal(issue, ~SavedMask("masks/one").mask.flags())
    assert score.min() == 0 and score.max() <= 1 and score[issue].max() < score[~issue].min()
    assert score[3] == score[25] == 0


def test_keys_are_the_safe_pairs_shard_by_shard(here, capsys):
    assert run(capsys, "mask", "export", "masks/one", "--format", "keys", "--out", "keys.txt")[0] == 0
    lines = [line.split("\t") for line in Path("keys.txt").read_text().splitlines()]
    assert lines == [[shard, key] for shard, key, _ in safe_samples(here)]


def test_datacomp_uids_are_sorted_halves_of_the_safe_pairs(here, capsys):
    words = ["mask", "export", "masks/one", "--format", "datacomp", "--out", "subset.npy"]
    assert "--shards" in refused(capsys, *words) and not Path("subset.npy").exists()
    assert run(capsys, *words, "--shards", *ALL)[0] == 0
    subset = np.load("subset.npy")
    wanted = sorted(int(json.loads(members["json"])["uid"], 16) for _, _, members in safe_samples(here))
    assert subset.dtype == np.dtype("u8,u8") and [(int(a) << 64) + int(b) for a, b in subset] == wanted
    assert np.array_equal(np.sort(subset), subset)
    assert "b/00000.tar" in refused(capsys, *words, "--shards", ALL[0])  # a part of the shards is no subset file


def test_datacomp_takes_keys_that_are_uids_and_never_a_uid_that_is_risky_too(tmp_path, capsys):
    """A uid at a safe and at a risky pair would bring the risky one back in DataComp's resharder."""
    uids = [f"{uid:032x}" for uid in (2**127, 1, 2**64, 5)]
    for shard in ("0", "1"):
        write_tar(
            tmp_path / f"{shard}.tar", [(f"{uid}.{e}", b"x") for uid in uids[int(shard) :] for e in ("jpg", "txt")]
        )
    index = build_index([f"{tmp_path}/0.tar", f"{tmp_path}/1.tar"], tmp_path / "index")
    cos = np.array(
        [0.9, 0.8, 0.7, 0.1, 0.85, 0.2, 0.6], np.float32
    )  # safe: uids 0, 1, 2 in shard 0; 1, and 5, in shard 1
    save_mask(tmp_path / "mask", index, cos, share=5 / 7)
    assert SavedMask(tmp_path / "mask").mask.flags().tolist() == [True, True, True, False, True, False, True]
    out = tmp_path / "subset.npy"
    assert run(capsys, "mask", "export", tmp_path / "mask", "--format", "datacomp", "--out", out)[0] == 0
    assert np.load(out).tolist() == [(0, 1), (2**63, 0)]


@given(st.lists(st.one_of(st.none(), st.integers(0, 2**128 - 1)), max_size=20))
def test_uids_sort_as_numbers(numbers):
    uid_N, there_N = as_array([uid_of_key(f"a/{n:032X}" if n is not None else "x") for n in numbers])
    known = [n for n in numbers if n is not None]
    halves = np.frombuffer(np.unique(uid_N[there_N]).tobytes(), ">u8").reshape(-1, 2)
    assert there_N.tolist() == [n is not None for n in numbers]
    assert [(int(a) << 64) + int(b) for a, b in halves] == sorted(set(known))


hostile = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(st.lists(st.one_of(hostile, hostile.map("=".__add__), hostile.map("'@".__add__)), min_size=1))
def test_no_name_is_a_formula_and_every_name_comes_back(names):
    written = guarded(pa.array(names)).to_pylist()
    assert not any(re.match("[=+@＝＋－＠\x00-\x1f-]", name) for name in written)
    assert [name.removeprefix("'") for name in written] == names


@settings(max_examples=25)
@given(st.lists(hostile.filter(lambda key: "\0" not in key), min_size=1, max_size=4))
def test_hostile_keys_survive_csv_and_key_list(tmp_path_factory, keys):
    folder = tmp_path_factory.mktemp("hostile")
    index = SimpleNamespace(counts=np.array([len(keys)]), offsets=np.array([0, len(keys)]), fingerprint="f")
    index.shards = [SimpleNamespace(path="/=data/=1+1.tar", size=0, fingerprint="f")]
    index.table = lambda shard: SimpleNamespace(keys=keys)
    save_mask(folder, index, np.ones(len(keys), np.float32), share=1.0)
    for form in ("csv", "keys"):
        cli.main(["mask", "export", str(folder), "--format", form, "--out", str(folder / form)])
    rows = list(csv.reader(io.StringIO((folder / "csv").read_bytes().decode(), newline="")))[1:]
    assert [row[2].removeprefix("'") for row in rows] == keys and {row[0] for row in rows} == {"'=1+1.tar"}
    lines = (folder / "keys").read_bytes().decode().split("\n")[:-1]
    back = {"\\\\": "\\", "\\t": "\t", "\\n": "\n", "\\r": "\r"}
    assert [re.sub(r"\\.", lambda m: back[m[0]], line.split("\t")[1]) for line in lines] == keys


# diff


def test_diff_counts_and_lists_what_moved(here, capsys):
    a, b = (SavedMask(f"masks/{name}").mask.flags() for name in ("one", "two"))
    code, text, _ = run(capsys, "mask", "diff", "masks/one", "masks/two", "--out", "moved.csv")
    both, only_a, only_b = (a & b).sum(), (a & ~b).sum(), (b & ~a).sum()
    assert f"in both {both}, in A only {only_a} (moved out), in B only {only_b} (moved in)" in text
    assert f"Jaccard {both / (a | b).sum():.4f}" in text
    with open("moved.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    offset = dict(zip(NAMES, (0, 20, 20, 27)))
    moved = {offset[r["shard"]] + int(r["position"]): r["moved"] for r in rows}
    assert moved == {int(n): "in" if b[n] else "out" for n in np.flatnonzero(a != b)}
    assert "Jaccard 1.0000" in run(capsys, "mask", "diff", "masks/one", "masks/one")[1]


def test_masks_of_other_shards_are_not_compared(here, capsys):
    make_tar(here / "other" / "00000.tar", 7, 20)
    make_tar(here / "other" / "00001.tar", 8, 5)
    first = build_index([f"{here}/data/a/00000.tar"], here / "i1")
    second = build_index([f"{here}/data/a/00000.tar", f"{here}/other/00001.tar"], here / "i2")
    save_mask(here / "masks" / "first", first, cosines(20))
    save_mask(here / "masks" / "second", second, cosines(25))
    error = refused(capsys, "mask", "diff", "masks/one", "masks/second")
    assert "number 1 is a/00001.tar" in error and "other/00001.tar" in error
    assert "other/00001.tar, is in masks/second only" in refused(capsys, "mask", "diff", "masks/first", "masks/second")


# replay

scores = arrays(
    np.float32, 40, elements=st.one_of(st.floats(-1, 1, width=32), st.sampled_from(np.float32([0, -0.0, 0.5, np.nan])))
)


@settings(max_examples=40)
@given(scores, st.floats(0, 1), st.floats(0, 1))
def test_any_split_is_rebuilt_bit_for_bit_and_any_other_bit_is_noticed(tmp_path_factory, cos_N, share, other):
    from pipeline.audit.masks import replay, what_if

    folder = tmp_path_factory.mktemp("replay")
    index = SimpleNamespace(counts=np.array([13, 0, 27]), offsets=np.array([0, 13, 13, 40]), fingerprint="f")
    index.shards = [SimpleNamespace(path=f"/d/{n}.tar", size=0, fingerprint=str(n)) for n in range(3)]
    index.table = lambda shard: SimpleNamespace(keys=[f"k{i}" for i in range(index.counts[shard])])
    save_mask(folder / "a", index, cos_N, share)
    assert replay(folder / "a")[0]
    what_if(folder / "a", folder / "b", share=other)
    assert replay(folder / "b")[0]
    assert SavedMask(folder / "b").mask.flags().sum() == min(round(other * 40), (~np.isnan(cos_N)).sum())
    flags = SavedMask(folder / "a").mask.flags()
    if flags.any() and not flags.all():  # one pair out, one in: the counts stay
        flags[[flags.argmax(), flags.argmin()]] ^= True
        SafeMask.from_flags(index.counts, flags).save(folder / "a", SavedMask(folder / "a").meta)
        assert not replay(folder / "a")[0]


def test_replay_as_a_command(here, capsys):
    code, text, _ = run(capsys, "mask", "replay", "masks/one")
    assert code == 0 and "bit for bit" in text
    code, text, _ = run(capsys, "mask", "replay", "masks/one", "--posterior", "0.5", "--out", "what")
    saved, other = SavedMask("masks/one"), SavedMask("what")
    from pipeline.safety.mixture import Mixture, upper_cut

    cut = upper_cut(Mixture.from_dict(saved.meta["mixture"]), 0.5)
    cos = np.concatenate([saved.table(s)["cosine"].to_numpy() for s in range(4)])
    assert code == 0 and np.array_equal(other.mask.flags(), cos >= cut) and other.meta["config"] is None
    assert run(capsys, "mask", "replay", "what")[0] == 0
    assert "holds a mask already" in refused(capsys, "mask", "replay", "masks/one", "--share", "0.1", "--out", "what")
    assert "--out" in refused(capsys, "mask", "replay", "masks/one", "--share", "0.1")
    assert "0 to 1" in refused(capsys, "mask", "replay", "masks/one", "--share", "60", "--out", "x")
    meta, flags = saved.meta, saved.mask.flags()
    flags[[flags.argmax(), flags.argmin()]] ^= True
    SafeMask.from_flags(saved.mask.counts_S, flags).save("masks/one", meta)
    code, text, _ = run(capsys, "mask", "replay", "masks/one")
    assert code == 1 and "NOT the saved mask, 2 pairs differ, the first at a/00000.tar position 0" in text


# apply


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


def test_apply_goes_on_with_the_shards_that_lack(here, capsys):
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


def changed(path):
    """One bit of the shard's last picture changes; its size stays."""
    data = bytearray(Path(path).read_bytes())
    data[data.rindex(b"IEND")] ^= 1
    Path(path).write_bytes(data)


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
        (lambda mask: rewrite(mask, lambda meta: meta.pop("cut")), "cut"),
        (lambda mask: rewrite(mask, lambda meta: meta["shards"].pop()), "4 shards"),
        (lambda mask: rewrite(mask, lambda meta: meta["shards"][0].update(name="../../x.tar")), "below one folder"),
        (lambda mask: rewrite(mask, lambda meta: meta["shards"][0].update(name="/etc/x.tar")), "below one folder"),
    ],
)
def test_a_damaged_mask_is_refused_by_name(here, capsys, harm, names):
    harm(here / "masks" / "one")
    assert names in refused(capsys, "mask", "show", "masks/one")
    assert names in refused(capsys, "mask", "export", "masks/one", "--format", "parquet", "--out", "m.parquet")
    assert not list(here.glob("*m.parquet*"))


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


# the readers of others


def test_webdataset_reads_the_safe_pairs_of_the_readme_in_place(here):
    names = {"/data/cc3m/{00000..00331}.tar": "data/a/{00000..00002}.tar", "runs/cc3m/masks/epoch_031": "masks/one"}
    text = WEBDATASET
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
    """The README's script with the real open_clip_train: two epochs on the CPU; what it read is noted behind the mask."""
    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (here / "tiny").mkdir()
    (here / "tiny" / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    (here / "train_safe.py").write_text(OPEN_CLIP)
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

    def train(mask):
        words = f"noting.py {mask} --train-data data/a/00000.tar --train-num-samples 8 --dataset-type webdataset --workers 0"
        words += " --batch-size 4 --epochs 2 --warmup 1 --model local-dir:tiny --logs logs --device cpu"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [sys.executable, *words.split()], capture_output=True, text=True, cwd=here, env=env, timeout=300
        )

    done = train("masks/one")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Train Epoch: 1 [8/8 (100%)]" in done.stderr
    wanted = {key for shard, key, _ in safe_samples(here) if shard == "a/00000.tar"}
    assert {line.split()[1] for line in done.stdout.splitlines() if line.startswith("READ")} == wanted
    changed("data/a/00000.tar")
    done = train("masks/one")
    assert done.returncode != 0 and "data/a/00000.tar: has fingerprint" in done.stderr


def test_the_readme_shows_these_readers():
    readme = (ROOT / "README.md").read_text()
    for code in (WEBDATASET, OPEN_CLIP):
        assert textwrap.indent(code, "    ") in readme


def test_mask_commands_need_no_torch(here):
    code = (
        "import sys; from pipeline.cli import main\n"
        "for words in (['show', 'masks/one'], ['diff', 'masks/one', 'masks/two'],\n"
        "              ['export', 'masks/one', '--format', 'csv', '--out', 'm.csv'],\n"
        "              ['apply', 'masks/one', 'data/b/00000.tar', '--out', 'out'], ['replay', 'masks/one']):\n"
        "    try: main(['mask', *words])\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "print([m for m in ('torch', 'deepspeed', 'open_clip', 'webdataset') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=3), min_size=1, max_size=6, unique_by=tuple))
def test_shard_names_are_unique_and_mean_the_same_where_they_are_moved_together(parts):
    shards = [
        SimpleNamespace(path="/data/x/../" + "/".join(p) + "/0.tar", size=1, fingerprint=str(n))
        for n, p in enumerate(parts)
    ]
    names = [shard["name"] for shard in shard_list(shards)]
    assert len(set(names)) == len(names)
    assert all(os.path.normpath(shard.path).endswith("/" + name) for shard, name in zip(shards, names))
