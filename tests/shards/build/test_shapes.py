"""The demo data: a pure function of its seed, in the layouts it promises, classes and captions that agree."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from pipeline.cli.main import main
from shards.build.emoji import list_pictures
from shards.build.shapes import CLASSES, SHAPES, draw_shape, render, shapes
from shards.errors import UserError
from shards.index.shard_index import ShardIndex
from shards.samples.samples import Samples


def test_a_scene_is_a_function_of_its_number_and_seed():
    assert render(7, 0) == render(7, 0)
    assert len({render(n, s)["png"] for n in (7, 8) for s in (0, 1)}) == 4


def test_the_caption_names_the_class_and_the_picture_is_decodable():
    for number in range(200):
        sample = render(number, 0)
        assert CLASSES[sample["cls"]] in sample["txt"]
        assert Image.open(io.BytesIO(sample["png"])).size == (32, 32)


def test_the_shapes_look_different():
    areas = {}
    for shape in SHAPES:
        stencil = Image.new("L", (64, 64))
        from PIL import ImageDraw

        draw_shape(ImageDraw.Draw(stencil), shape, 32, 32, 20, 0.0)
        areas[shape] = np.asarray(stencil) > 0
    for one in SHAPES:
        for other in SHAPES:
            assert one == other or (areas[one] ^ areas[other]).sum() > 60


def test_the_layout_and_a_second_call(tmp_path):
    out = tmp_path / "shapes"
    shapes(out, pairs=30, test=8)
    labels, captions = Samples(ShardIndex.load(out / "labels")), Samples(ShardIndex.load(out / "index"))
    assert captions.index.samples == 30 and ShardIndex.load(out / "test_index").samples == 8
    assert all(CLASSES[labels.label(0, p)] in captions.caption(0, p) for p in range(30))
    shown, told = Samples(ShardIndex.load(out / "test_index")), Samples(ShardIndex.load(out / "test_captions"))
    assert all(CLASSES[shown.label(0, p)] in told.caption(0, p) for p in range(8))
    assert (out / "test" / "nshards.txt").read_text() == "1\n"
    assert (out / "classnames.txt").read_text().splitlines() == CLASSES
    assert "{c}" in (out / "zeroshot_classification_templates.txt").read_text()
    with tarfile.open(out / "test" / "0.tar") as tar:
        assert {name.partition(".")[2] for name in tar.getnames()} == {"png", "cls", "txt"}
    before = (out / "train" / "00000.tar").stat().st_mtime_ns
    shapes(out, pairs=30, test=8)
    assert (out / "train" / "00000.tar").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="delete it or name another folder"):
        shapes(out, pairs=31, test=8)


def test_an_index_that_is_gone_is_made_again_of_the_shards(tmp_path):
    shapes(tmp_path / "out", pairs=12, seed=1)
    before = ShardIndex.load(tmp_path / "out" / "index").fingerprint
    tars = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*.tar")}
    for name in ("index", "labels", "test_index"):
        shutil.rmtree(tmp_path / "out" / name)
    shapes(tmp_path / "out", pairs=12, seed=1)
    assert ShardIndex.load(tmp_path / "out" / "index").fingerprint == before
    assert tars == {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*.tar")}


def test_a_build_that_was_cut_off_is_made_anew(tmp_path):
    out = tmp_path / "shapes"
    shapes(out, pairs=20, test=4)
    (out / "made_by.json").unlink()
    (out / "unfinished").touch()
    shapes(out, pairs=20, test=4)
    assert json.loads((out / "made_by.json").read_text())["pairs"] == 20 and not (out / "unfinished").exists()


def test_of_some_emoji_one_vendors_drawings_are_held_out():
    described, pictures = [], {}
    for number in range(40):
        tones = {"1F3FB": {"image": f"{number}-light.png"}} if number % 2 else {}
        described.append(
            {
                "unified": f"{number:X}",
                "name": f"THING {number}",
                "short_name": "thing",
                "image": f"{number}.png",
                "category": "Things",
                "subcategory": "large-thing" if number < 36 else "rare",
                "skin_variations": tones,
            }
        )
        for vendor in ("google", "twitter"):
            for image in (f"{number}.png", f"{number}-light.png"):
                pictures[vendor, image] = b""
    rows, classes = list_pictures(described, {}, pictures, 0)
    assert classes == ["large thing"] and len(rows) == 36 * 2 + 18 * 2
    held_out, trained = {}, {}
    for row in rows:
        number = row["image"].split(".")[0].split("-")[0]
        (held_out if row["test"] else trained).setdefault(number, set()).add(row["vendor"])
    assert len(trained) == 36 and len(held_out) == round(0.25 * 36)
    for number, vendors in held_out.items():
        assert len(vendors) == 1 and trained[number] == {"google", "twitter"} - vendors
    assert any("with light skin" in row["caption"] for row in rows)


@pytest.mark.parametrize("pairs", [0, -5])
def test_a_data_set_of_no_pairs_is_refused(tmp_path, pairs, capsys):
    with pytest.raises(UserError, match=f"^--pairs: got {pairs}, expected 1 or more"):
        shapes(tmp_path / "out", pairs=pairs)
    with pytest.raises(SystemExit):
        main(["data", "shapes", str(tmp_path / "out"), "--pairs", str(pairs)])
    assert "--pairs" in capsys.readouterr().err and not (tmp_path / "out").exists()
