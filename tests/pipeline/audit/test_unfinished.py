"""What a detector found is the same after it was kept, and what does not belong to the audit is not taken."""

from types import SimpleNamespace

import numpy as np

from pipeline.audit.detectors import Finding, Group
from pipeline.audit.unfinished import Unfinished


def data(fingerprint="a", sample=1024):
    return SimpleNamespace(
        scores=None, rounds=[], saved=SimpleNamespace(meta={"fingerprint": fingerprint}), sample=sample
    )


def test_a_finding_comes_back_as_it_was_kept(tmp_path):
    groups = [
        Group("patch", "<b>text</b>", np.array([5, 2]), 0.25, (0.0, 0.5, 1.0, 0.75)),
        Group("words", "", np.array([], np.int64), 1.0),
    ]
    scores = np.array([0.5, np.nan, 1.0], np.float32)
    more = {"nearest": np.array([2, 0, 1])}
    Unfinished(tmp_path, data(), 0.01).save("one", Finding(scores, scores < 1, groups, more), {"seconds": 2.5})
    kept = Unfinished(tmp_path, data(), 0.01)
    found, about = kept.load("one")
    assert about == {"seconds": 2.5} and kept.load("another") is None
    assert np.array_equal(found.score_N, scores, equal_nan=True) and found.issue_N.tolist() == [True, False, False]
    assert found.score_N.dtype == np.float32 and found.more["nearest"].tolist() == [2, 0, 1]
    for one, other in zip(found.groups, groups, strict=True):
        assert (one.title, one.text, one.badness) == (other.title, other.text, other.badness)
        assert one.rows.tolist() == other.rows.tolist() and (one.box and tuple(one.box)) == other.box


def test_what_is_of_another_audit_or_broken_is_not_taken(tmp_path):
    finding = Finding(np.ones(3, np.float32), np.zeros(3, bool))
    for others in (data("b"), 0.01), (data(sample=3), 0.01), (data(), 0.02):
        Unfinished(tmp_path, data(), 0.01).save("one", finding, {})
        assert Unfinished(tmp_path, *others).load("one") is None
    kept = Unfinished(tmp_path, data(), 0.01)
    kept.save("one", finding, {})
    path = tmp_path / "unfinished/one.npz"
    for broken in (path.read_bytes()[:-40], b"", b"no archive"):
        path.write_bytes(broken)
        assert kept.load("one") is None
