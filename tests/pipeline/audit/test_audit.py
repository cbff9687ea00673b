"""An audit from shards to report: what is in the files, and what a person sees and does in a real browser."""

import csv
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.audit.apply import apply_mask
from pipeline.audit.audit import audit
from pipeline.audit.detectors import REGISTRY, Finding, neighbourhood
from pipeline.audit.report import cosine_histogram, render
from pipeline.audit.report_items import Items
from pipeline.audit.report_map import SIDE, places
from pipeline.audit.score import score
from shards.errors import UserError
from shards.order.safe_mask import SavedMask
from shards.samples.overlay import VERSION
from tests.helpers.audits import make_model, make_pairs, picture
from tests.helpers.browser import CHROMIUM, Browser

ROOT = Path(__file__).parents[3]
HOSTILE = [
    "<script>document.title = 'owned'</script>",
    "</script><script>document.title = 'owned'</script><!--",
    "<img src=x onerror=\"document.title = 'owned'\">",
    "\"><svg/onload=document.title='owned'><a href=\"javascript:document.title='owned'\">",
    "<!--<script>",
    "</style><style>* { display: none }</style>",
    "a \u202etxet desrever\u202c and \u2066isolated\u2069 \u200f and a\u2028line\u2029end",
    "bell \x07 escape \x1b[31m null \x00 delete \x7f tab\tend",
    "=cmd|' /C calc'!A0",
    "مرحبا بالعالم and שלום and \U0001f469\u200d\U0001f680 and \ufffe",
    "a" * 4000,
    "{{data}} {{policy}} &lt;b&gt; \\u003cscript\\u003e",
]
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """data/, scores/ and audit/ of 60 pairs: hostile captions, a repeated one, a patch in every fifth picture, one
    broken picture."""
    folder = tmp_path_factory.mktemp("audited")
    captions = [HOSTILE[i] if i < len(HOSTILE) else f"thing {i}" if i % 4 else "the same words" for i in range(60)]
    pictures = {row: picture(row, True) for row in range(3, 60, 5)} | {
        20: b"no picture",
        31: picture(30),
        32: picture(30),
    }
    paths = make_pairs(folder / "data", captions, pictures)
    score(folder / "scores", make_model(folder / "model"), data=paths, workers=0)
    attack = folder / "attack"
    attack.mkdir()
    rows = [
        {"shard": r // 20, "position": r % 20, "key": "", "kind": "patch", "caption": captions[r], "source": None}
        for r in range(3, 60, 5)
    ]
    index = json.loads((folder / "scores/mask.json").read_text())["fingerprint"]
    manifest = {
        "version": VERSION,
        "fingerprint": index,
        "source": "",
        "source_fingerprint": "",
        "classes": ["thing"],
        "kinds": {
            "patch": {
                "attack": "badnets",
                "judged": "backdoor",
                "target_class": 0,
                "pairs": len(rows),
                "trigger": {"pattern": "patch"},
            }
        },
        "rows": rows,
    }
    (attack / "manifest.json").write_text(json.dumps(manifest))
    audit(folder / "scores", folder / "audit", truth=attack, worst=0.2)
    return folder, captions, paths


def test_findings_are_cleanlabs_columns_for_every_pair(audited):
    folder, _, _ = audited
    table = pq.read_table(folder / "audit/findings.parquet")
    assert len(table) == 60 and table["position"].to_pylist()[20:22] == [0, 1]
    ran = {name for name, kind in REGISTRY.items() if not kind.package} - {"history", "excluded"}
    for name in [*ran, "suspect"]:
        issue_N, score_N = table[f"is_{name}_issue"].to_numpy(), table[f"{name}_score"].to_numpy()
        known = score_N[~np.isnan(score_N)]
        assert issue_N.dtype == bool and known.min() >= 0 and known.max() <= 1
        if issue_N.any() and name != "mismatch":
            assert known[issue_N[~np.isnan(score_N)]].max() <= known[~issue_N[~np.isnan(score_N)]].min()
    assert np.flatnonzero(table["is_broken_issue"].to_numpy()).tolist() == [20]
    assert set(np.flatnonzero(table["is_common_patch_issue"].to_numpy())) == set(range(3, 60, 5))
    patched = table["reasons"].to_pylist()[3].split("; ")
    assert f"common_patch: score {table['common_patch_score'][3].as_py():.2f}" in patched
    assert pyarrow.csv.read_csv(folder / "audit/findings.csv").column_names == table.column_names


def test_ground_truth_is_in_audit_json(audited):
    found = json.loads((audited[0] / "audit/audit.json").read_text())
    assert all(found["detectors"][name]["skipped"].startswith("no run") for name in ("history", "excluded"))
    truth = found["truth"]
    patch = truth["detectors"]["common_patch"]["attacks"]["patch"]
    assert patch["auroc"] == patch["average_precision"] == 1.0 and patch["roc"][-1] == [1.0, 1.0]
    assert len(truth["masks"]) == 1 and 0 <= truth["masks"][0]["recall"] <= 1


def test_nothing_but_the_scores_is_needed(audited, tmp_path):
    folder, _, _ = audited
    shutil.copytree(folder / "scores", tmp_path / "scores")
    for name in ("img_emb", "text_emb", "cells", "index"):
        shutil.rmtree(tmp_path / "scores" / name)
    about = json.loads((tmp_path / "scores/score.json").read_text())
    gone = {"embeddings": None, "data": {"index": str(tmp_path / "gone")}}
    (tmp_path / "scores/score.json").write_text(json.dumps({**about, **gone}))
    audit(tmp_path / "scores", tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    found = json.loads((tmp_path / "out/audit.json").read_text())["detectors"]
    assert "no embeddings" in found["dao"]["skipped"] and found["mismatch"]["issues"] <= 1 and "webp" not in page


def test_a_large_sample_of_neighbours_is_searched_by_ivf(audited, tmp_path, monkeypatch):
    made, build_index = [], neighbourhood.build_index
    monkeypatch.setattr(neighbourhood, "EXACT", 20)
    monkeypatch.setattr(neighbourhood, "build_index", lambda rows: made.append(build_index(rows)) or made[-1])
    audit(audited[0] / "scores", tmp_path / "out", detectors=["slof"], sample=60)
    score_N = pq.read_table(tmp_path / "out/findings.parquet")["slof_score"].to_numpy()
    assert [(type(index).__name__, index.ntotal) for index in made] == [("IndexIVFFlat", 59)]
    assert np.isnan(score_N).sum() == 1 and len(np.unique(score_N[~np.isnan(score_N)])) == 59


def test_progress_is_logged_and_not_printed(audited, tmp_path, caplog, capsys):
    caplog.set_level("INFO", "pipeline")
    audit(audited[0] / "scores", tmp_path / "out", detectors=["slof"])
    assert capsys.readouterr().out == "" and "60 pairs in 3 shards" in caplog.text and "slof" in caplog.text


@pytest.mark.parametrize("score_N", [[0.3, 0.3 + 1e-7], [0.3, 0.3], []])
def test_scores_that_are_nearly_equal_make_a_histogram(score_N):
    counts, low, high = cosine_histogram(np.array(score_N, np.float32))
    assert sum(counts) == len(score_N) and high > low


@pytest.mark.parametrize(
    "options, words",
    [
        ({"worst": 0}, "--worst"),
        ({"sample": 2}, "--sample: got 2"),
        ({"detectors": ["nothing"]}, "expected some of"),
        ({"detectors": ["history"]}, "none of"),
    ],
)
def test_mistakes_are_named(audited, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        audit(audited[0] / "scores", tmp_path / "out", **options)


def test_data_cannot_leave_its_element(audited):
    page = (audited[0] / "audit/report.html").read_text()
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert not set(data) & set("<>&") and data.isascii()
    content = json.loads(data)
    captions = {item["c"] for item in content["items"]}
    assert content["scored"] == sum(content["histogram"]["counts"]) == 59  # of which the mixture is, one is broken
    assert HOSTILE[0] in captions and HOSTILE[6] in captions
    assert set(content["shards"]) == set(content["shard_prints"]) == {str(item["s"]) for item in content["table"]}
    assert page.count("<script") == 2 and "http" not in re.sub(r'"http://www.w3.org/2000/svg"|http-equiv', "", page)


@pytest.fixture(scope="module")
def page(audited):
    with Browser() as browser:
        browser.open(audited[0] / "audit/report.html")
        yield browser


@needs_chromium
def test_hostile_captions_are_text(audited, page):
    assert page.run("document.title") == "Audit of image-caption pairs"
    assert all(url.startswith(("file:", "data:image/webp")) for url in page.requests)
    assert page.problems == []
    text = page.run("main.innerText") + page.run("(state.page.table = 1, draw('table'), main.innerText)")
    for caption in HOSTILE[:6] + HOSTILE[8:9] + HOSTILE[11:]:
        assert caption in text
    assert "U+202E" in text and "U+0007" in text and "U+2028" in text
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u2028\u2029\x00-\x08\x0b-\x1f]", text)
    assert page.run("document.querySelectorAll('main script, main a, main style, [onerror], [onload]').length") == 0
    assert page.run("[...document.images].every(i => i.src.startsWith('data:image/webp;base64,'))")
    assert page.run("document.querySelectorAll('article.pair').length") == 24


@needs_chromium
def test_the_policy_stops_what_is_not_ours(audited, tmp_path):
    """Were markup ever to get in, it would not run: the same page with a script of another in it."""
    text = (audited[0] / "audit/report.html").read_text()
    bad = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
    (tmp_path / "page.html").write_text(text.replace("</main>", "</main>" + bad))
    with Browser() as browser:
        browser.open(tmp_path / "page.html")
        assert browser.run("document.title") == "Audit of image-caption pairs"
        assert browser.run("document.querySelectorAll('article').length") > 0


@needs_chromium
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_the_window(audited, page, width):
    page.open(audited[0] / "audit/report.html", width)
    assert page.run("document.documentElement.scrollWidth") <= width


@needs_chromium
def test_ticks_by_keyboard_go_back_into_the_mask(audited, page, tmp_path):
    folder, captions, paths = audited
    page.open(folder / "audit/report.html")
    page.run("document.querySelectorAll('article.group .marks button')[0].click()")
    page.run("document.querySelector('article.pair').focus()")
    page.press("p")
    page.press("j")
    page.press("f")
    exported = page.run(
        "new Promise(done => { const make = URL.createObjectURL; URL.createObjectURL = blob => { "
        "blob.text().then(done); return make(blob); }; document.getElementById('export').click(); })"
    )
    rows = list(csv.DictReader(exported.splitlines()))
    assert len(rows) > 2 and {row["verdict"] for row in rows} == {"poison", "fine"}
    (tmp_path / "review.csv").write_text(exported)
    apply_mask(folder / "scores", paths, tmp_path / "safe", review=tmp_path / "review.csv", workers=1)
    saved = SavedMask(folder / "scores")
    flags = saved.mask.flags()
    for row in rows:
        flags[saved.find(row["shard"]) * 20 + int(row["position"])] = row["verdict"] == "fine"
    sizes = json.loads((tmp_path / "safe/sizes.json").read_text())
    assert [sizes[f"{number:05d}.tar"] for number in range(3)] == flags.reshape(3, 20).sum(1).tolist()


MAPPED = "D.map.suspects.map(([x, y, id]) => [x, y, D.items[id].k, D.items[id].c, D.items[id].flags])"


def shown_map(page, folder):
    """Open the report at its map; (suspects of it, a function from a point to the middle of its place in the
    window)."""
    page.open(folder / "audit/report.html")
    page.run("document.getElementById('map').scrollIntoView()")
    left, top, scale = page.run(
        "(() => { const box = document.querySelector('#map svg'), r = box.getBoundingClientRect(); "
        "return [r.left, r.top, r.width / box.viewBox.baseVal.width]; })()"
    )
    return page.run(MAPPED), lambda x, y: (left + (x + 20) * scale, top + (y + 20) * scale)


@needs_chromium
def test_a_click_on_the_map_opens_the_card(audited, page):
    suspects, spot = shown_map(page, audited[0])
    flagged = set(np.flatnonzero(pq.read_table(audited[0] / "audit/findings.parquet")["reasons"].to_numpy() != ""))
    assert {int(key) for _, _, key, _, _ in suspects} == flagged - {20} and len(flagged) > 10  # 20 cannot be read
    assert len(suspects) + page.run("D.map.others.length") == 59
    x, y, *_ = suspects[0]
    same = {one[2] for one in suspects if abs(one[0] - x) < 18 and abs(one[1] - y) < 18}
    page.move(*spot(x, y))
    said = page.run("document.querySelector('#map .said').innerText.split('\\n')[0]")
    assert said in same and page.run("document.querySelector('dialog')") is None
    page.click(*spot(x, y))
    card = page.run("document.querySelector('dialog[open] article').innerText")
    assert f"· {said}" in card and page.run("document.activeElement.closest('dialog').open")
    page.press("p")
    assert page.run("document.querySelector('dialog article').dataset.verdict") == "poison"
    page.press("u")
    page.press("Escape")
    # Closed at once, and taken away by an event after that.
    gone = "(done) => document.querySelector('dialog') ? setTimeout(window.look, 10, done) : done(true)"
    assert page.run(f"new Promise(window.look = {gone})") and page.problems == []
    page.click(*spot(-19, -19))  # a corner without a point
    assert page.run("document.querySelector('dialog')") is None


@needs_chromium
def test_the_map_is_walked_by_keyboard_and_hostile_captions_are_text_there(audited, page):
    suspects, _ = shown_map(page, audited[0])
    page.run("document.querySelector('#map .area').focus()")
    seen = {}
    for _, _, key, *_ in suspects:
        page.press("ArrowRight")
        seen[key] = page.run("document.querySelector('#map .said').innerText")
        assert seen[key].startswith(key)
    hostile = [key for key in seen if int(key) < 6]
    assert hostile and all(HOSTILE[int(key)] in seen[key] for key in hostile)
    assert page.run("document.title") == "Audit of image-caption pairs" and page.problems == []
    page.press("Enter")
    assert page.run("document.querySelector('dialog[open] article').innerText").find(key) >= 0


@needs_chromium
def test_a_filter_leaves_its_suspects_on_the_map(audited, page):
    suspects, _ = shown_map(page, audited[0])
    page.run(
        "(() => { const box = document.querySelector('select'); box.value = 'common_patch'; "
        "box.dispatchEvent(new Event('change')); })()"
    )
    wanted = [one for one in suspects if "common_patch" in one[4]]
    assert page.run("document.querySelectorAll('#map .area svg path').length") == len(wanted) + 1  # one for all others
    assert (
        page.run("document.querySelector('#map .legend').innerText")
        == f"the same patch at the same place ({len(wanted)})"
    )
    assert page.run("lists.gallery().length") == len(wanted)


def test_the_same_rows_have_the_same_places_and_odd_ones_are_no_harm():
    row_MD = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    first = places(row_MD)
    np.testing.assert_array_equal(first, places(row_MD))
    assert first.min() == 0 and first[:, 0].max() == SIDE and len(np.unique(first, axis=0)) > 50
    for odd in (np.zeros((30, 8)), row_MD[:2], row_MD[:, :1], np.repeat(row_MD[:2], 20, 0)):
        found = places(odd.astype(np.float32))
        assert found.shape == (len(odd), 2) and found.min() >= 0 and found.max() <= SIDE


def test_the_recipe_for_fiftyone_opens_what_was_found(audited, tmp_path, monkeypatch):
    """The code in the README, with a stand-in for FiftyOne, which keeps its samples in a MongoDB."""
    recipe = (ROOT / "pipeline/audit/README.md").read_text().split("### FiftyOne\n")[1].split("Then `fiftyone")[0]
    code = [line[4:] for line in recipe.splitlines() if line.startswith("    ") or not line]
    made = []
    dataset = SimpleNamespace(add_samples=made.extend)
    stand_in = SimpleNamespace(Sample=lambda path, **fields: (path, fields), Dataset=lambda *_, **__: dataset)
    monkeypatch.setitem(sys.modules, "fiftyone", stand_in)
    monkeypatch.chdir(tmp_path)
    for name in ("scores", "audit"):
        (tmp_path / name).symlink_to(audited[0] / name)
    (tmp_path / "pictures").mkdir()
    exec("\n".join(code), {})
    rows = [fields["position"] + 20 * int(fields["shard"][:5]) for _, fields in made]
    reasons = pq.read_table(audited[0] / "audit/findings.parquet")["reasons"].to_numpy()
    assert rows == [row for row in np.flatnonzero(reasons != "") if row != 20]
    for row, (path, fields) in zip(rows, made):
        assert Image.open(path).size == (64, 64) and fields["caption"] == audited[1][row]
        assert {reason.split(":")[0] for reason in fields["reasons"].split("; ")} == set(fields["tags"]) - {"suspect"}


@needs_chromium
def test_search_filters_captions(page, audited):
    page.open(audited[0] / "audit/report.html")
    page.run(
        "(() => { const box = document.getElementById('search'); box.value = 'THE SAME'; "
        "box.dispatchEvent(new Event('input')); })()"
    )
    shown = page.run(
        "new Promise(r => setTimeout(() => r([...document.querySelectorAll('#table tbody tr td:nth-child(4)')]"
        ".map(c => c.innerText)), 400))"
    )
    assert shown and set(shown) == {"the same words"}


@pytest.mark.parametrize(
    "line, words",
    [
        ("x.tar,0,,fine", "none of mask"),
        ("00000.tar,20,,fine", "expected 0 to 19"),
        ("00000.tar,0,,maybe", "expected poison or fine"),
        ("00000.tar,0,abc,fine", "had fingerprint abc"),
    ],
)
def test_a_wrong_review_is_named_by_its_line(audited, tmp_path, line, words):
    (tmp_path / "review.csv").write_text("shard,position,fingerprint,verdict\n" + line + "\n")
    with pytest.raises(UserError, match=f"line 2: .*{words}"):
        apply_mask(audited[0] / "scores", audited[2], tmp_path / "out", review=tmp_path / "review.csv")
    assert not (tmp_path / "out").exists()


def test_render_refuses_what_is_no_number():
    with pytest.raises(ValueError):
        render({"x": float("nan")})


def test_a_detector_that_gives_all_pairs_one_score_ranks_none_low():
    """Else it would be named as the reason of any suspect."""
    first, second = [name for name, one in REGISTRY.items() if one.ranks][:2]
    score_N, flag_N = np.array([3, 1, 2], np.float32), np.zeros(3, bool)
    items = Items(None, {first: Finding(score_N, flag_N), second: Finding(np.ones(3, np.float32), flag_N)})
    items.rows = [0, 1, 2]
    assert items.ranks() == {first: [0.66667, 0.0, 0.33333], second: [0.66667] * 3}
