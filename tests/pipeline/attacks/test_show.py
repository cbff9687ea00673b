"""`safeclip attack`, and the picture of a manifest."""

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.attacks import load_trigger
from pipeline.attacks.manifest import make_attack
from pipeline.attacks.sheet import CELL, GAP, HEIGHT, LINE, SIDE, enlarged, show
from pipeline.cli.main import main
from shards.errors import UserError
from shards.index.shard_index import ShardIndex
from shards.samples.overlay import Overlay
from shards.samples.samples import Samples
from tests.helpers.attacks import attack_config

ATTACKS = {
    "patch": {"attack": "badnets", "pairs": 6, "size": 0.3, "decoys": 4},
    "mixed": {"attack": "label_consistent", "pairs": 2, "trigger": {"pattern": "blended"}},
    "near": {"attack": "class_to_class", "pairs": 5, "source_class": "red star"},
    "one": {"attack": "single_target", "targets": 2, "captions": 3},
}


def test_a_sheet_shows_clean_and_triggered_pictures_side_by_side(data, tmp_path):
    make_attack(attack_config(data, tmp_path, ATTACKS))
    show(tmp_path / "manifest.json", tmp_path / "sheet.png", pairs=3)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (GAP + 4 * HEIGHT, GAP + 4 * CELL, 3)
    index = ShardIndex.load(data / "index")
    clean, bad = Samples(index), Samples(index, Overlay.load(tmp_path, index, load_trigger))
    rows = [row for row in bad.overlay.rows if row["kind"] == "patch"][:2]
    rows += [row for row in bad.overlay.decoys][:1]
    for column, row in enumerate(rows):
        top, left, place = GAP + 3 * LINE, GAP + column * CELL, (row["shard"], row["position"])
        for at, samples in enumerate((clean, bad)):
            shown = sheet[top : top + SIDE, left + at * (SIDE + 2) :][:, :SIDE]
            image = samples.image(*place)
            np.testing.assert_array_equal(
                shown, image.resize((SIDE, SIDE), Image.NEAREST)
            )  # 32 px, four times as large


def test_pictures_of_any_size_and_ones_that_cannot_be_read_have_their_square():

    for size in ((1, 1), (300, 20), (20, 300), (128, 128), (5, 7)):
        assert enlarged(Image.new("RGB", size, "red")).size == (SIDE, SIDE)
    assert enlarged(None).getpixel((5, 5)) == (225, 225, 225)


def test_the_command_writes_a_manifest_and_its_picture(data, tmp_path, capsys):
    (tmp_path / "attack.yaml").write_text(
        yaml.safe_dump(attack_config(data, tmp_path / "out", ATTACKS), sort_keys=False)
    )
    main(["attack", str(tmp_path / "attack.yaml"), "seed=3", "attacks.patch.pairs=7"])
    assert "patch 7, mixed 2, near 5, one 6, and 4 decoys" in capsys.readouterr().out
    sheet = tmp_path / "a new folder/sheet.png"
    main(["attack", "show", str(tmp_path / "out"), "--out", str(sheet)])
    assert Image.open(sheet).width == GAP + 5 * CELL


@pytest.mark.parametrize(
    "words, names",
    [
        (["attack.yaml", "--out", "x.png"], "attack show FOLDER"),
        (["show", "out"], "attack show FOLDER"),
        (["show", "--out", "x.png"], "attack show FOLDER"),
        (["show", "nowhere", "--out", "x.png"], "nowhere/manifest.json"),
        (["nowhere.yaml"], "nowhere.yaml"),
        (["attack.yaml", "out=attack.yaml/below"], "attack config: out: cannot write attack.yaml/below/manifest.json"),
        (["show", "made", "--out", "attack.yaml/x.png"], "--out: cannot write attack.yaml/x.png"),
        (["show", "made", "--out", "made"], "--out: cannot write made"),
        (["attack.yaml", "attacks.patch.pairs=0"], "attacks.patch.pairs: got 0, expected a whole number >= 1"),
        (["attack.yaml", "attacks.patch.siz=0.2"], "attacks.patch.siz: unknown"),
        (["attack.yaml", "attacks.patch=3"], "attacks.patch.attack: got 3"),
        (["attack.yaml", "attacks.patch=badnets"], "attacks.patch: got 'badnets', expected a mapping"),
        (["attack.yaml", "attacks.other.attack=badnets"], "attacks.other.pairs: got neither"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(data, tmp_path, monkeypatch, capsys, words, names):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "attack.yaml").write_text(
        yaml.safe_dump(attack_config(data, tmp_path / "out", ATTACKS), sort_keys=False)
    )
    if "made" in words:
        make_attack(attack_config(data, "made", ATTACKS))
    with pytest.raises(SystemExit) as left:
        main(["attack", *words])
    error = capsys.readouterr().err
    assert left.value.code == 2 and names in error and error.count("\n") == 1


def test_a_folder_without_a_manifest_of_ours_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text('{"version": 2, "kinds": {}}')
    with pytest.raises(UserError, match="cannot be read"):
        show(tmp_path, tmp_path / "sheet.png")
