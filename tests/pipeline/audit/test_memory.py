"""What an audit needs of memory, what a host has, and the refusal where that is less."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.audit import blocks, captions, findings, memory
from pipeline.audit.audit import audit
from pipeline.audit.data import AuditData
from pipeline.audit.detectors import chosen, repeated
from pipeline.audit.embeddings import Rows
from pipeline.audit.memory import available, needed
from pipeline.audit.score import score
from shards.errors import UserError
from tests.helpers.audits import make_model, make_pairs, picture
from tests.helpers.saved_masks import refused

GB = 10**9
ROUNDED = ("kdistance", "slof", "dao", "suspect")  # ranks by distances, whose last bits depend on a product's shape


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """scores/ of 60 pairs in 3 shards: repeated captions, copies of a picture, a patch, a broken picture."""
    folder = tmp_path_factory.mktemp("memory")
    pictures = {row: picture(row, True) for row in range(3, 60, 5)} | {20: b"no picture", 31: picture(30)}
    paths = make_pairs(folder / "data", [f"thing {row % 17}" for row in range(60)], pictures)
    score(folder / "scores", make_model(folder / "model"), data=paths, workers=0)
    return folder / "scores"


def test_needs_grow_with_the_pairs_and_not_with_their_width():
    names = chosen(None)
    small, large = (needed(pairs, 512, names, 1024) for pairs in (10**6, 10**8))
    assert (large - small) / (99 * 10**6) < 200 and large < 24 * GB
    assert needed(10**8, 1024, names, 1024) - large < GB  # blocks of rows, whose number does not grow
    assert needed(10**8, 0, ["mismatch", "broken"], 1024) < needed(10**8, 512, names, 1024)
    assert needed(10**6, 512, names, 10**6) - small > 2 * 10**6 * 512


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_group_above_this_one_may_leave_the_least(tmp_path, monkeypatch, version):
    own = {1: "4:cpu,memory:/a/b", 2: "0::/a/b"}[version]
    top = tmp_path / "memory" if version == 1 else tmp_path
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}
    most, used, cached = names.get(version, ("memory.max", "memory.current", "inactive_file"))
    for group, limit in (("a/b", "max"), ("a", 5 * GB)):
        folder = top / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / most).write_text(f"{limit}\n")
        (folder / used).write_text(f"{3 * GB}\n")
        (folder / "memory.stat").write_text(f"anon 7\n{cached} {GB}\n")
    read = memory.Path.read_text
    files = {"/proc/meminfo": f"MemTotal: 9 kB\nMemAvailable: {8 * GB // 1024} kB\n", "/proc/self/cgroup": own + "\n"}
    monkeypatch.setattr(memory.Path, "read_text", lambda path: files.get(str(path)) or read(path))
    assert available(tmp_path) == 3 * GB  # 5 less 3, of which the kernel gives 1 back
    (top / "a" / most).unlink()
    assert available(tmp_path) == 8 * GB // 1024 * 1024
    files["/proc/meminfo"] = "nothing"
    assert available(tmp_path) is None


def test_what_does_not_fit_is_refused_in_one_line_before_it_starts(scored, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 10**8)
    line = refused(capsys, "audit", scored, "--out", tmp_path / "out", "--sample", 10**6)
    assert "60 pairs with embeddings of width 16 and 8 detectors need about 1.0 GB of memory, 0.1 GB are" in line
    assert "--detectors mismatch (1.0 GB)" in line and "--sample" not in line and not (tmp_path / "out").exists()
    monkeypatch.setattr(memory, "available", lambda: None)  # nobody knows
    audit(scored, tmp_path / "out", detectors=["mismatch"])


def test_a_large_sample_is_named_where_less_would_do():
    class Data:
        N, sample, source, rounds, cells = 10**8, 10**7, "scores", [], None
        images = type("Images", (), {"width": 512})

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="or --sample 1024 .* or --detectors"):
        patch.setattr(memory, "available", lambda: 10**8)
        memory.require_memory(Data, chosen(None))


def test_blocks_of_seven_rows_find_what_one_block_finds(scored, tmp_path, monkeypatch):
    audit(scored, tmp_path / "whole", worst=0.2)
    monkeypatch.setattr(blocks, "BLOCK", 7)
    monkeypatch.setattr(repeated, "SUMS", 32)
    monkeypatch.setattr(findings, "ROW_GROUP", 7)
    monkeypatch.setattr(Rows.blocks, "__defaults__", (7,))
    audit(scored, tmp_path / "blocks", worst=0.2)
    one, other = (pq.read_table(tmp_path / name / "findings.parquet") for name in ("whole", "blocks"))
    assert one.schema == other.schema
    for name in one.column_names:
        if name.endswith("_score"):
            a, b = (table[name].to_numpy() for table in (one, other))
            np.testing.assert_allclose(
                a, b, atol=0.02 if name.startswith(("kdist", "slof", "dao", "suspect")) else 1e-6
            )
        elif name != "reasons":
            assert one[name].equals(other[name]), name


def test_rows_are_read_wherever_they_lie(tmp_path):
    counts, rng = [4, 0, 1, 6], np.random.default_rng(0)
    parts = [rng.normal(size=(count, 40)).astype(np.float16) for count in counts]
    for number, part in enumerate(parts):
        np.save(tmp_path / f"{number}.npy", part)
    rows, whole = Rows({n: tmp_path / f"{n}.npy" for n in (0, 2, 3)}, counts), np.concatenate(parts)
    some = rng.integers(0, 11, 30)
    np.testing.assert_array_equal(rows.take(some), whole[some])
    np.testing.assert_array_equal(np.concatenate([block for _, block in rows.blocks(3)]), whole)
    columns = [block for _, block in rows.columns(np.sort(some), 16, 7)]
    np.testing.assert_array_equal(np.concatenate(columns).T, whole[np.sort(some)])
    assert rows.take([]).shape == (0, 40)


def test_captions_are_read_a_shard_at_a_time_and_their_lack_is_named(scored, monkeypatch):
    data = AuditData(scored)
    assert data.named([59, 0, 20]) == [("00059", "thing 8"), ("00000", "thing 0"), ("00020", "thing 3")]
    assert [len(texts) for texts in data.captions] == [20, 20, 20]
    data.metadata.pop(1)
    with pytest.raises(UserError, match="metadata part 1 cannot be read"):
        data.caption(1, 0)
    with pytest.raises(UserError, match="is of 20 pairs, expected 21"):
        captions.metadata_column(data.metadata, 0, "caption", 21)
