"""A mask's folder is enough to show, export, compare and rebuild it."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.audit.datacomp import as_array, uid_of_key
from pipeline.audit.export import guarded
from pipeline.cli import main as cli
from shards.index.build_index import build_index
from shards.index.shard_list import Shard, ShardList
from shards.order.safe_mask import SafeMask, SavedMask
from shards.order.shard_names import NamedShards, shard_columns
from tests.helpers.saved_masks import ALL, NAMES, cosines, make_tar, refused, run, safe_samples, save_mask
from tests.helpers.tars import write_tar

ROOT = Path(__file__).parents[3]


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
    assert all(
        shown[key] == meta[key]
        for key in ("epoch", "step", "fingerprint", "fraction", "threshold", "mixture", "config")
    )
    assert shown["pairs"] == 40 and shown["safe"] == 20 and shown["bad_pairs"] == {"no caption": 1, "no picture": 1}
    assert 0 <= shown["least_safe_shard"]["fraction"] <= shown["fraction"] <= shown["most_safe_shard"]["fraction"] <= 1


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
    threshold = saved.meta["threshold"]
    assert all(
        safe == (cos is not None and cos >= threshold)
        for safe, cos in zip(*(table[c].to_pylist() for c in ("safe", "cosine")))
    )
    assert json.loads(table.schema.metadata[b"safeclip_mask"])["fingerprint"] == saved.meta["fingerprint"]
    with open("out/m.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["shard"], r["key"], r["safe"] == "true") for r in rows] == list(
        zip(*(table[c].to_pylist() for c in ("shard", "key", "safe")))
    )
    assert [np.float32(r["cosine"]) if r["cosine"] else None for r in rows] == table["cosine"].to_pylist()


def test_cleanlab_columns_rank_as_the_threshold_does(here, capsys):
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
    save_mask(tmp_path / "mask", index, cos, fraction=5 / 7)
    assert SavedMask(tmp_path / "mask").mask.flags().tolist() == [True, True, True, False, True, False, True]
    out = tmp_path / "subset.npy"
    assert run(capsys, "mask", "export", tmp_path / "mask", "--format", "datacomp", "--out", out)[0] == 0
    assert np.load(out).tolist() == [(0, 1), (2**63, 0)]


@given(st.lists(st.one_of(st.none(), st.integers(0, 2**128 - 1)), max_size=20))
def test_uids_sort_as_numbers(numbers):
    uid_N = as_array([uid_of_key(f"a/{n:032X}" if n is not None else "x") for n in numbers])
    known = [n for n in numbers if n is not None]
    halves = np.frombuffer(np.unique(uid_N["uid"][uid_N["there"]]).tobytes(), ">u8").reshape(-1, 2)
    assert uid_N["there"].tolist() == [n is not None for n in numbers]
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
    index.shards = ShardList.of([Shard("/=data/=1+1.tar", 0, len(keys), "f", "")])
    index.keys = lambda shard: keys
    save_mask(folder, index, np.ones(len(keys), np.float32), fraction=1.0)
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
def test_any_mask_is_rebuilt_bit_for_bit_and_any_other_bit_is_noticed(tmp_path_factory, cos_N, fraction, other):
    from pipeline.audit.mask_commands import replay, what_if

    folder = tmp_path_factory.mktemp("replay")
    index = SimpleNamespace(counts=np.array([13, 0, 27]), offsets=np.array([0, 13, 13, 40]), fingerprint="f")
    index.shards = ShardList.of([Shard(f"/d/{n}.tar", 0, 0, str(n), "") for n in range(3)])
    index.keys = lambda shard: [f"k{i}" for i in range(index.counts[shard])]
    save_mask(folder / "a", index, cos_N, fraction)
    assert replay(folder / "a")[0]
    what_if(folder / "a", folder / "b", fraction=other)
    assert replay(folder / "b")[0]
    assert SavedMask(folder / "b").mask.flags().sum() == min(round(other * 40), (~np.isnan(cos_N)).sum())
    flags = SavedMask(folder / "a").mask.flags()
    if flags.any() and not flags.all():  # one pair out, one in: the counts stay
        flags[[flags.argmax(), flags.argmin()]] ^= True
        saved = SavedMask(folder / "a")
        SafeMask.from_flags(index.counts, flags).save(folder / "a", saved.meta, saved.shards.batch)
        assert not replay(folder / "a")[0]


def test_replay_as_a_command(here, capsys):
    code, text, _ = run(capsys, "mask", "replay", "masks/one")
    assert code == 0 and "bit for bit" in text
    Path("masks/one/img_emb").mkdir()
    Path("masks/one/img_emb/img_emb_00000.npy").write_bytes(b"of all pairs: too large to copy")
    code, text, _ = run(capsys, "mask", "replay", "masks/one", "--posterior", "0.5", "--out", "what")
    assert not Path("what/img_emb").exists()
    saved, other = SavedMask("masks/one"), SavedMask("what")
    from pipeline.safety.mixture import Mixture, posterior_threshold

    threshold = posterior_threshold(Mixture.from_dict(saved.meta["mixture"]), 0.5)
    cos = np.concatenate([saved.table(s)["cosine"].to_numpy() for s in range(4)])
    assert code == 0 and np.array_equal(other.mask.flags(), cos >= threshold) and other.meta["config"] is None
    assert run(capsys, "mask", "replay", "what")[0] == 0
    assert "holds a mask already" in refused(
        capsys, "mask", "replay", "masks/one", "--fraction", "0.1", "--out", "what"
    )
    assert "--out" in refused(capsys, "mask", "replay", "masks/one", "--fraction", "0.1")
    assert "0 to 1" in refused(capsys, "mask", "replay", "masks/one", "--fraction", "60", "--out", "x")
    meta, flags = saved.meta, saved.mask.flags()
    flags[[flags.argmax(), flags.argmin()]] ^= True
    SafeMask.from_flags(saved.mask.counts_S, flags).save("masks/one", meta, saved.shards.batch)
    code, text, _ = run(capsys, "mask", "replay", "masks/one")
    assert code == 1 and "NOT the saved mask, 2 pairs differ, the first at a/00000.tar position 0" in text


def test_mask_commands_need_no_torch(here):
    code = (
        "import sys; from pipeline.cli.main import main\n"
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
    shards = [Shard("/data/x/../" + "/".join(p) + "/0.tar", 1, 0, str(n), "") for n, p in enumerate(parts)]
    names = [shard["name"] for shard in NamedShards(shard_columns(ShardList.of(shards)))]
    assert len(set(names)) == len(names)
    assert all(os.path.normpath(shard.path).endswith("/" + name) for shard, name in zip(shards, names))
