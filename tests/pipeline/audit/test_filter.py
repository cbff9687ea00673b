"""Masks of filters and of the oracle: exactly the pairs that they are to leave out, and usable as any other mask."""

import json

import numpy as np
import pytest

from pipeline.audit import filter as filters
from pipeline.audit.data import AuditData
from pipeline.audit.detectors.neighbourhood import DAO, SLOF, KDistance, factors
from pipeline.audit.filter import filter_pairs, keep_unpoisoned
from pipeline.audit.score import score
from shards.errors import UserError
from shards.index.build_index import build_index
from shards.index.shard_index import ShardIndex
from shards.order.safe_mask import IsSafe, SavedMask
from shards.samples.overlay import VERSION
from shards.storage.files import write_json
from tests.helpers.audits import make_model, make_pairs, picture
from tests.helpers.saved_masks import refused, run, samples

N, PATCHED = 60, range(20, 26)  # six of a trigger, too few in 40 sampled pictures to be each other's 16 neighbours


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """data/ of 60 pairs in 3 shards, one of which has no caption, and their scores/ by an untrained CLIP."""
    folder = tmp_path_factory.mktemp("filter")
    captions = [f"a picture of thing {i % 11}" if i != 7 else b"\xff" for i in range(N)]
    paths = make_pairs(folder / "data", captions, {row: picture(row, patch=True) for row in PATCHED})
    score(folder / "scores", make_model(folder / "model"), data=paths, workers=0, batch_size=16)
    return folder


def test_the_lowest_cosines_are_left_out_and_the_unreadable(scored, tmp_path):
    filter_pairs(scored / "scores", "cosine", 0.2, tmp_path / "mask")
    cos_N = AuditData(scored / "scores").cos_N
    order = sorted(range(N), key=lambda row: (np.isnan(cos_N[row]), -cos_N[row], row))
    assert np.flatnonzero(SavedMask(tmp_path / "mask").mask.flags()).tolist() == sorted(order[:48])
    assert not SavedMask(tmp_path / "mask").mask.flags()[7]


def test_a_filter_holds_the_keys_of_one_shard_at_a_time(scored, tmp_path, monkeypatch):
    done, read, write = [], SavedMask.table, filters.write_bytes

    def reading(self, shard, columns):
        done.append("read" if "key" in columns else None)
        return read(self, shard, columns)

    monkeypatch.setattr(SavedMask, "table", reading)
    monkeypatch.setattr(filters, "write_bytes", lambda path, data: (done.append("written"), write(path, data)))
    filter_pairs(scored / "scores", "cosine", 0.2, tmp_path / "mask")
    assert [what for what in done if what] == ["read", "written"] * 3


@pytest.mark.parametrize("kind", [KDistance, SLOF, DAO])
def test_the_strongest_outliers_are_left_out(scored, tmp_path, kind):
    filter_pairs(scored / "scores", kind.name, 0.1, tmp_path / "mask")
    data = AuditData(scored / "scores")
    factor_N = factors(data)[kind.name]
    order = sorted(set(range(N)) - {7}, key=lambda row: (factor_N[row], -row))  # among equals the first stand out more
    assert np.flatnonzero(SavedMask(tmp_path / "mask").mask.flags()).tolist() == sorted(order[:54])


def test_a_filters_mask_is_used_as_any_other(scored, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(scored)
    mask = tmp_path / "dao"
    code, out, _ = run(capsys, "mask", "filter", "scores", "--by", "dao", "--remove", 0.05, "--out", mask)
    assert code == 0 and "57 of 60 pairs kept" in out
    assert "the worst 5.0% by dao are left out" in run(capsys, "mask", "show", mask)[1]
    assert run(capsys, "mask", "replay", mask)[0] == 0
    assert "safe in both 57" in run(capsys, "mask", "diff", mask, mask)[1]
    for kind in ("parquet", "cleanlab"):
        assert run(capsys, "mask", "export", mask, "--format", kind, "--out", tmp_path / kind)[0] == 0
    assert run(capsys, "mask", "apply", mask, "data/{00000..00002}.tar", "--out", tmp_path / "copies")[0] == 0
    kept = samples(sorted((tmp_path / "copies").rglob("*.tar")))
    safe = IsSafe(mask)
    paths = sorted((scored / "data").glob("*.tar"))
    keys = SavedMask(mask).table(0, ("key",))["key"].to_pylist()
    flags = [safe({"__url__": str(paths[0]), "__key__": key}) for key in keys]
    assert len(kept) == 57 and flags == SavedMask(mask).mask.shard_flags(0).tolist()
    assert "holds a mask already" in refused(capsys, "mask", "filter", "scores", "--by", "dao", "--out", mask)


def manifest(index, rows, decoys=()):
    row = {"key": "", "kind": "badnets", "caption": "a thing", "source": None}
    return {
        "version": VERSION,
        "seed": 0,
        "fingerprint": index.fingerprint,
        "source": "",
        "source_fingerprint": "",
        "classes": ["thing"],
        "kinds": {
            "badnets": {
                "attack": "badnets",
                "judged": "backdoor",
                "target_class": 0,
                "pairs": len(rows),
                "trigger": {"pattern": "patch"},
                "decoys": len(decoys),
                "decoy_opacity": 0.5,
            }
        },
        "rows": [{**row, "shard": shard, "position": position} for shard, position in rows],
        "decoys": [
            {**row, "kind": "badnets_decoy", "shard": shard, "position": position} for shard, position in decoys
        ],
    }


def test_the_oracle_leaves_out_the_poison_and_nothing_else(scored, tmp_path, capsys):
    index = build_index([str(path) for path in sorted((scored / "data").glob("*.tar"))], tmp_path / "index")
    write_json(tmp_path / "attack/manifest.json", manifest(index, [(0, 3), (2, 19)], [(1, 0)]))
    words = ("mask", "oracle", tmp_path / "attack", "--index", tmp_path / "index")
    code, out, _ = run(capsys, *words, "--out", tmp_path / "oracle")
    assert code == 0 and "57 of 60 pairs kept" in out
    assert np.flatnonzero(~SavedMask(tmp_path / "oracle").mask.flags()).tolist() == [3, 20, 59]
    assert run(capsys, "mask", "show", tmp_path / "oracle", "--json")[0] == 0
    assert run(capsys, "mask", "replay", tmp_path / "oracle")[0] == 0
    # A part of what is clean: so many, none of them poisoned, others by another seed.
    parts = []
    for seed in (0, 1):
        run(capsys, *words, "--fraction", 0.25, "--seed", seed, "--out", tmp_path / f"part{seed}")
        parts.append(SavedMask(tmp_path / f"part{seed}").mask.flags())
        assert parts[-1].sum() == 15 and not parts[-1][[3, 20, 59]].any()
    assert (parts[0] != parts[1]).any()


def test_what_cannot_be_filtered_is_refused(scored, tmp_path, capsys):
    with pytest.raises(UserError, match="--remove: got 1.5"):
        filter_pairs(scored / "scores", "dao", 1.5, tmp_path / "mask")
    about = json.loads((scored / "scores/score.json").read_text())
    lean = tmp_path / "lean"
    score(lean, str(scored / "model"), data=[about["data"]["index"]], lean=True, workers=0)
    with pytest.raises(UserError, match="no embeddings"):
        filter_pairs(lean, "dao", 0.05, tmp_path / "mask")
    filter_pairs(lean, "cosine", 0.05, tmp_path / "mask")
    with pytest.raises(UserError, match="--remove 0.9999: keeps none of the 60 pairs"):
        filter_pairs(scored / "scores", "cosine", 0.9999, tmp_path / "empty")
    index = ShardIndex.load(about["data"]["index"])
    write_json(tmp_path / "attack/manifest.json", manifest(index, [(0, 3)]))
    with pytest.raises(UserError, match="--fraction 1e-09: keeps none of the 60 pairs"):
        keep_unpoisoned(tmp_path / "attack", index, tmp_path / "empty", fraction=1e-9)
    assert not (tmp_path / "empty").exists()
    with pytest.raises(UserError, match="--fraction: got 0"):
        keep_unpoisoned(tmp_path, None, tmp_path / "out", fraction=0)
