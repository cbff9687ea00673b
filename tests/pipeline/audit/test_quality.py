"""Picture quality by cleanvision: planted faults among pictures, against cleanvision itself, and without it."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter

from pipeline.audit import quality
from pipeline.audit.audit import audit
from pipeline.audit.data import AuditData
from pipeline.audit.detectors import REGISTRY, chosen
from pipeline.audit.detectors.copies import CleanvisionNear
from pipeline.audit.score import score
from shards.errors import UserError
from tests.helpers.audits import make_model, make_pairs

COPY, NEAR = (20, 21, 22), (23, 24)  # one picture three times; one and its like
PLANTED = {"dark": 1, "light": 2, "blurry": 3, "low_information": 4, "odd_size": 5, "odd_aspect_ratio": 6}
GREY, BROKEN = (7, 8), 9  # 7 in mode L, 8 in RGB


def photo(seed, size=(96, 96)):
    """Coarse shapes with edges and grain, as photographs have."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size, Image.NEAREST)
    grain = rng.normal(0, 30, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def planted():
    """30 pictures, {row: PIL picture}, with the faults above."""
    found = {row: photo(row) for row in range(30)}
    found[1] = found[1].point(lambda value: value // 8)
    found[2] = found[2].point(lambda value: 255 - value // 16)
    # Of all shades: cleanvision takes a picture of few for a drawing, and not for a blurred photograph.
    shades = Image.linear_gradient("L").resize((96, 96)).point(lambda value: int(0.7 * value)).convert("RGB")
    found[3] = Image.blend(found[3], shades, 0.8).filter(ImageFilter.GaussianBlur(3))
    found[4] = Image.new("RGB", (96, 96), (90, 120, 200))
    found[5], found[6] = photo(5, (1200, 1100)), photo(6, (192, 48))
    found[7] = found[7].convert("L")
    found[8] = found[8].convert("L").convert("RGB")
    found[21] = found[22] = found[20]
    found[24] = found[23].copy()
    found[24].putpixel((5, 5), (1, 2, 3))
    return found


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    pytest.importorskip("cleanvision")
    folder = tmp_path_factory.mktemp("quality")
    pictures = {row: png(image) for row, image in planted().items()} | {BROKEN: b"no picture"}
    paths = make_pairs(folder / "data", [f"picture {row}" for row in range(30)], pictures, 12)
    score(folder / "scores", make_model(folder / "model"), data=paths, workers=0)
    audit(folder / "scores", folder / "audit", detectors=["default", "quality"])
    return folder, pq.read_table(folder / "audit/findings.parquet")


def flagged(table, name):
    return set(np.flatnonzero(table[f"is_{name}_issue"].to_numpy()).tolist())


def test_planted_faults_are_found(audited):
    _, table = audited
    for name, row in PLANTED.items():
        assert row in flagged(table, name), name
        assert table[f"{name}_score"][row].as_py() <= np.nanmin(table[f"{name}_score"].to_numpy()) + 1e-6, name
    honest = set(range(10, 30))
    assert not honest & set().union(*(flagged(table, name) for name in PLANTED))
    assert flagged(table, "grayscale") == set(GREY)
    assert flagged(table, "cleanvision_exact") == set(COPY) and flagged(table, "cleanvision_near") == set(NEAR)
    assert table["cleanvision_exact_score"].to_numpy()[list(COPY)] == pytest.approx(1 / 3)
    assert all(np.isnan(table[f"{name}_score"].to_numpy()[BROKEN]) for name in (*PLANTED, "cleanvision_near"))
    assert f"dark: score {table['dark_score'][1].as_py():.2f}" in table["reasons"][1].as_py()


def test_scores_are_those_of_cleanvision_on_files(audited, tmp_path):
    """A picture in RGB with equal channels left out, and one above LARGE, which is measured in a smaller copy."""
    from cleanvision import Imagelab

    table = audited[1]
    rows = [row for row in range(30) if row not in (5, GREY[1], BROKEN)]
    pictures = planted()
    for row in rows:
        pictures[row].save(tmp_path / f"{row:02d}.png")
    lab = Imagelab(data_path=str(tmp_path), verbose=False)
    lab.find_issues(n_jobs=1, verbose=False)
    theirs = lab.issues.sort_index()
    for name in set(quality.KINDS) - {"odd_size"}:  # which depends on all pictures
        assert table[f"{name}_score"].to_numpy()[rows] == pytest.approx(theirs[f"{name}_score"].to_numpy()), name
        assert flagged(table, name) & set(rows) == {rows[i] for i in np.flatnonzero(theirs[f"is_{name}_issue"])}, name
    for ours, name in (("cleanvision_exact", "exact_duplicates"), ("cleanvision_near", "near_duplicates")):
        assert table[f"{ours}_score"].to_numpy()[rows] == pytest.approx(theirs[f"{name}_score"].to_numpy())


def test_a_large_picture_is_measured_in_a_smaller_copy(audited, monkeypatch):
    data = AuditData(audited[0] / "scores")
    monkeypatch.setattr(quality, "LARGE", 2000)
    whole, small = quality.measure_all(data).frame, audited[1]
    for name in quality.KINDS:
        assert small[f"{name}_score"][5].as_py() == pytest.approx(whole[f"{name}_score"][5], abs=0.05), name


def test_quality_has_no_part_in_suspect_and_its_groups_are_in_the_report(audited):
    folder, table = audited
    audit(folder / "scores", folder / "default")
    np.testing.assert_array_equal(
        table["suspect_score"], pq.read_table(folder / "default/findings.parquet")["suspect_score"]
    )
    page = (folder / "audit/report.html").read_text()
    assert "3 pictures; near_duplicate finds 3 of them alike" in page and "1 pictures, scores" in page


def test_quality_alone_ranks_by_the_number_of_flags(audited, tmp_path):
    audit(audited[0] / "scores", tmp_path, detectors=["quality"])
    table = pq.read_table(tmp_path / "findings.parquet")
    count = table["is_suspect_issue"].to_numpy().sum()
    assert count == sum(reason != "" for reason in table["reasons"].to_pylist()) >= len(PLANTED) + 7
    flags = [len(reason.split("; ")) if reason else 0 for reason in table["reasons"].to_pylist()]
    kinds = [name for name, kind in REGISTRY.items() if kind.family == "quality"]
    assert table["suspect_score"].to_numpy() == pytest.approx(1 - np.array(flags) / len(kinds))


def test_near_sets_that_are_exact_sets_are_left_out():
    hash_M2 = np.array([[1, 5], [1, 5], [2, 6], [2, 6], [3, 6], [4, 0], [5, 0], [6, 9]], np.uint64)
    assert CleanvisionNear().sets(hash_M2).tolist() == [-1, -1, 1, 1, 1, 0, 0, -1]
    assert CleanvisionNear().sets(hash_M2[:0]).tolist() == []


def test_names_families_and_default():
    default = chosen(None)
    assert "dark" not in default and chosen(["default"]) == default and "slof" in default
    assert chosen(["slof", "neighbourhood"]) == ["slof", "kdistance", "dao"]
    with pytest.raises(UserError, match="--detectors: got 'x', expected some of default, .*quality.*, dark"):
        chosen(["x"])


def test_without_the_package_a_named_detector_is_an_error_of_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "dark" not in chosen(None)
    with pytest.raises(UserError, match="^--detectors: blurry needs the package cleanvision.*pip install cleanvision$"):
        chosen(["slof", "blurry"])
