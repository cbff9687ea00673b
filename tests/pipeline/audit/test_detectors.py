"""Detectors: each against its definition, worked out by brute force, or against what was planted."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.audit import detectors
from pipeline.audit.detectors import REGISTRY, Detector, Finding, detector, lacking, lowest, patches, repeated
from pipeline.audit.detectors import neighbourhood as nb
from pipeline.audit.detectors.repeated import agreement
from pipeline.audit.embeddings import Rows
from pipeline.audit.findings import combined
from pipeline.audit.hash_groups import NEAR, near_groups
from pipeline.audit.pixels import GRID, hamming, signature
from pipeline.audit.truth import against_truth, precision_at
from shards.samples.decode import decode_image
from tests.helpers.audits import picture


class Data:
    """What detectors read of an AuditData."""

    def __init__(self, folder, image_ND, score_N=None):
        np.save(folder / "part.npy", image_ND.astype(np.float32))
        self.images, self.N, self.cache = Rows({0: folder / "part.npy"}, [len(image_ND)]), len(image_ND), {}
        self.score_N, self.sample = np.zeros(self.N, np.float32) if score_N is None else score_N, 1024


def brute(rows, k):
    """(distances, numbers) of the k nearest others."""
    distance = np.linalg.norm(rows[:, None] - rows[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    number = np.argsort(distance, 1, kind="stable")[:, :k]
    return np.take_along_axis(distance, number, 1), number


def test_outlier_factors_are_those_of_their_papers(tmp_path):
    rows = nb.unit(np.random.default_rng(0).normal(size=(60, 8)))
    distance, number = brute(rows, nb.NEIGHBOURS)
    far = distance[:, -1]
    slof = np.array([np.mean(far[i] / far[number[i]]) for i in range(60)])
    lid = np.array([-1 / np.mean(np.log(distance[i] / far[i])) for i in range(60)])
    dao = np.array([np.mean((far[i] / far[number[i]]) ** lid[number[i]]) for i in range(60)])
    for name, factor in (("kdistance", far), ("slof", slof), ("dao", dao)):
        data = Data(tmp_path, rows)
        found = REGISTRY[name]().find(data, 0.1)
        np.testing.assert_allclose(nb.factors(data)[name], factor, rtol=1e-4)
        assert found.issue_N.sum() == 6 and factor[found.issue_N].min() >= factor[~found.issue_N].max() * 0.9999


@pytest.mark.parametrize("name", ["kdistance", "slof", "dao"])
@pytest.mark.parametrize("wrong", ["not finite", "zero"])
def test_rows_without_a_direction_are_no_harm(tmp_path, name, wrong):
    rows = np.random.default_rng(0).normal(size=(60, 8))
    if wrong == "zero":
        rows[:] = 0
    else:
        rows[4], rows[7, 0] = np.nan, np.inf
    for sample in (20, 60):
        data = Data(tmp_path, rows)
        data.sample = sample
        found = REGISTRY[name]().find(data, 0.1)
        assert np.isfinite(found.score_N).all() and found.issue_N.sum() == 6


@pytest.mark.parametrize("scored", [0, 1, 2, 3])
def test_neighbours_are_looked_for_among_three_pairs_or_more(tmp_path, scored):
    score_N = np.full(9, np.nan, np.float32)
    score_N[:scored] = 0
    data = Data(tmp_path, np.random.default_rng(0).normal(size=(9, 8)), score_N)
    for name in ("kdistance", "slof", "dao"):
        why = lacking(REGISTRY[name], data)
        if scored < 3:
            assert why == f"{scored} scored pairs, at least 3 are needed"
        else:
            assert why is None and not np.isnan(REGISTRY[name]().find(data, 0.1).score_N[:3]).any()


def test_unreadable_pairs_are_not_judged_and_no_reference(tmp_path):
    score_N = np.zeros(60, np.float32)
    score_N[5] = np.nan
    rows = np.random.default_rng(0).normal(size=(60, 8))
    rows[5] = 0
    found = REGISTRY["dao"]().find(Data(tmp_path, rows, score_N), 0.1)
    assert np.isnan(found.score_N[5]) and np.isnan(found.score_N).sum() == 1 and not found.issue_N[5]


def test_ivf_finds_nearly_what_exact_search_finds(monkeypatch):
    rng = np.random.default_rng(0)
    rows = nb.unit(rng.normal(size=(20, 16))[rng.integers(0, 20, 3000)] + 0.3 * rng.normal(size=(3000, 16)))
    own = np.arange(3000)
    exact = nb.search(nb.build_index(rows), rows, own, 8)
    monkeypatch.setattr(nb, "EXACT", 1000)
    index = nb.build_index(rows)
    distance, number = nb.search(index, rows, own, 8)
    assert type(index).__name__ == "IndexIVFFlat" and not (number == own[:, None]).any()
    assert np.mean([len(set(a) & set(b)) / 8 for a, b in zip(exact[1], number)]) > 0.9


@given(st.lists(st.integers(1, 2**64 - 1), min_size=1, max_size=12), st.data())
def test_near_duplicates_are_grouped_and_no_others(bases, data):
    hashes = list(bases)
    for base in bases[:4]:
        bits = data.draw(st.sets(st.integers(0, 63), max_size=NEAR))
        hashes.append(base ^ sum(1 << bit for bit in bits))
    hash_N = np.array(hashes, np.uint64)
    group_N = near_groups(hash_N)
    near = (hamming(hash_N[:, None], hash_N[None]) <= NEAR) & (hash_N != 0)[:, None] & (hash_N != 0)[None]
    for i in range(len(hashes)):
        members = group_N == group_N[i]
        if group_N[i] >= 0:
            assert members.sum() >= 2
            assert any((near[leader] | ~members).all() for leader in np.flatnonzero(members))  # one is near to all
        else:
            assert not any(near[i, j] and group_N[j] < 0 for j in range(len(hashes)) if j != i)


@pytest.mark.parametrize("sums", [1, 1 << 20])
def test_agreement_is_the_mean_cosine_with_the_others(tmp_path, monkeypatch, sums):
    """Whether the sums of all groups are in memory at once, or of one at a time."""
    monkeypatch.setattr(repeated, "SUMS", sums)
    rows = np.random.default_rng(1).normal(size=(9, 4))
    group_N = np.array([0, 0, 0, -1, 1, 1, -1, 0, 1])
    found, unit = agreement(Data(tmp_path, rows).images, group_N, 2), nb.unit(rows)
    for i in range(9):
        others = [j for j in range(9) if j != i and group_N[j] == group_N[i] >= 0]
        assert found[i] == pytest.approx(np.mean([unit[i] @ unit[j] for j in others]) if others else 1, abs=1e-5)


@pytest.mark.parametrize("name, copies", [("repeated_caption", 3), ("near_duplicate", 2), ("near_duplicate", 9)])
def test_copies_of_one_pair_agree_however_their_embeddings_round(tmp_path, name, copies):
    """Equal pictures under equal captions are no finding of either."""
    rows = np.repeat(np.random.default_rng(0).normal(size=(40, 64)), copies, 0).astype(np.float16)
    data = Data(tmp_path, rows)
    data.texts, data.hash_N = data.images, np.repeat(np.arange(1, 41, dtype=np.uint64) * 0x0101010101010101, copies)
    data.captions, data.caption, data.place = [[f"c {i // copies}" for i in range(data.N)]], str, lambda row: (row,)
    found = REGISTRY[name]().find(data, 0.05)
    assert found.groups and (found.score_N == 1).all() and not found.issue_N.any()


def patched(folder, marked):
    """What CommonPatch reads of 60 pictures, those of `marked` with a patch."""
    found = [signature(Image.fromarray(decode_image(picture(row, row in marked)))) for row in range(60)]
    np.save(folder / "cells.npy", np.stack([cells for _, cells in found]))
    cells = Rows({0: folder / "cells.npy"}, [60])
    hash_N = np.array([whole for whole, _ in found], np.uint64)
    return SimpleNamespace(N=60, cells=cells, hash_N=hash_N, score_N=np.zeros(60, np.float32))


@pytest.mark.parametrize("sample", [60, 40])
def test_a_planted_patch_is_found_and_only_where_it_is(tmp_path, monkeypatch, sample):
    """Also where the patch is looked for in a part of the pictures."""
    monkeypatch.setattr(patches, "SAMPLE", sample)
    marked = range(3, 60, 5)
    found = patches.CommonPatch().find(patched(tmp_path, marked), 0.5)
    assert set(np.flatnonzero(found.issue_N)) == set(marked)
    for group in found.groups:
        left, top, *_ = group.box
        assert group.rows.tolist() == list(marked) and group.size == len(marked) and min(left, top) >= 12 / GRID
    assert found.groups


def test_copies_of_one_picture_are_no_patch(tmp_path):
    cells = np.tile(signature(Image.fromarray(decode_image(picture(0, True))))[1], (30, 1))
    np.save(tmp_path / "cells.npy", cells)
    rows = Rows({0: tmp_path / "cells.npy"}, [30])
    excess_N, worst = patches.look_up(rows, patches.repeated_cells(rows, np.arange(30), np.zeros(30, np.int64)))
    assert not patches.merged(worst) and not excess_N.any()


@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_repeated_cells_are_what_counting_finds(tmp_path_factory, seed, block):
    """Excess, intersections and rows, counted by hand; read `block` rows at a time."""
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("cells")
    cells_NG = rng.integers(0, 4, (40, GRID * GRID)).astype(np.uint32)
    cells_NG[:, 3:] *= rng.random((40, GRID * GRID - 3)) < 0.05  # mostly plain
    np.save(folder / "cells.npy", cells_NG)
    picture_N = rng.integers(0, 30, 40)
    rows = Rows({0: folder / "cells.npy"}, [40])
    counts = {}
    for cell in range(GRID * GRID):
        for value in range(1, 4):
            unlike = len(set(picture_N[cells_NG[:, cell] == value]))
            counts[cell, value] = unlike if unlike >= 2 else 0
    expected_N, found = np.zeros(40, np.float32), []
    for (cell, value), unlike in counts.items():
        elsewhere = sum(n for (c, v), n in counts.items() if v == value and c != cell) / (GRID * GRID - 1)
        excess = unlike / (1 + elsewhere)
        if unlike >= patches.LEAST and excess > 1:
            here = cells_NG[:, cell] == value
            expected_N[here] = np.maximum(expected_N[here], np.float32(excess))
            found += [(excess, cell, np.flatnonzero(here))] if excess >= patches.EXCESS else []
    found.sort(key=lambda one: -one[0])
    in_blocks = Rows.blocks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rows, "blocks", lambda self: in_blocks(self, block))
        excess_N, worst = patches.look_up(rows, patches.repeated_cells(rows, np.arange(40), picture_N))
    np.testing.assert_allclose(excess_N, expected_N)
    assert worst.cell_T.tolist() == [cell for _, cell, _ in found]
    for i, (_, _, mine) in enumerate(found):
        assert worst.rows[i].tolist() == mine.tolist()
        assert worst.both_TT[i].tolist() == [len(np.intersect1d(mine, other)) for _, _, other in found]


@given(st.lists(st.one_of(st.floats(0, 1), st.just(float("nan"))), min_size=1, max_size=50), st.floats(0.01, 0.9))
def test_lowest_flags_the_lowest(scores, fraction):
    score_N = np.array(scores)
    flags_N = lowest(score_N, fraction)
    assert flags_N.sum() == min(np.ceil(fraction * len(scores)), (score_N < 1).sum())
    if flags_N.any():
        assert not (score_N[~flags_N] < score_N[flags_N].max()).any()


def test_a_new_detector_is_a_class_and_nothing_else(monkeypatch):
    monkeypatch.setattr(detectors, "REGISTRY", dict(REGISTRY))

    @detector
    class Even(Detector):
        name, needs = "even", ("captions",)

        def find(self, data, worst):
            return Finding(np.ones(3), np.zeros(3, bool))

    class Nothing:
        captions = None

    assert detectors.REGISTRY["even"] is Even and lacking(Even, Nothing).startswith("no captions")


def test_combined_wants_two_bad_signs_or_one_very_bad(monkeypatch):
    rng = np.random.default_rng(0)
    one, other = rng.permutation(1000) / 1000, rng.permutation(1000) / 1000
    one[:2], other[:2] = [0.0005, 0.9], [0.0005, 0.9]  # the first pair is bad in both, the second in none
    findings = {"mismatch": Finding(one, one < 0), "common_patch": Finding(other, other < 0)}
    found = combined(findings, 0.01)
    assert found.score_N[0] == 0 and found.score_N[1] > 0.5 and found.issue_N.sum() == 10
    tied = combined({**findings, "near_duplicate": Finding(np.ones(1000), other < 0)}, 0.01)
    np.testing.assert_array_equal(tied.score_N, found.score_N)  # a detector that says nothing changes nothing


def test_precision_where_ties_are_cut():
    assert precision_at(np.array([0.0, 1, 1, 1]), np.array([True, True, False, False]), 0.5) == pytest.approx(2 / 3)


@pytest.mark.parametrize("poisoned", [3, 4])
def test_a_manifest_that_leaves_no_pair_clean_has_no_curves(poisoned):
    mask = SimpleNamespace(flags=lambda: np.zeros(4, bool), fraction=0.0)
    saved = SimpleNamespace(mask=mask, meta={"epoch": 1})
    data = SimpleNamespace(N=4, truth=lambda: {"badnets": np.arange(poisoned)}, rounds=[], saved=saved)
    scores = SimpleNamespace(score_N=np.array([0.1, 0.2, 0.3, 0.9], np.float32))
    found = against_truth(data, {"low": scores}, scores)
    assert json.loads(json.dumps(found, allow_nan=False)) == found and bool(found) == (poisoned < 4)
