"""Every file and folder that a command is given, wrong in every way: one line, exit code 2, no traceback."""

import errno
import gzip
import shutil

import click
import pytest
import yaml

from pipeline.attacks.manifest import make_attack
from pipeline.cli.main import main, safeclip
from pipeline.cli.options import PATH
from pipeline.training import checkpoint, start
from pipeline.training import run as running
from shards.build.shapes import shapes
from shards.errors import UserError
from shards.storage import files
from tests.helpers.attacks import attack_config
from tests.helpers.models import MODEL
from tests.helpers.pictures import picture
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import config


def train_one(folder):
    made = config(folder, "run", train__epochs=3, evaluation__test=str(folder / "shapes"), evaluation__every=0)
    made.data.overlay = str(folder / "attack")
    running.train(made)
    main(["evaluate", made.run.dir])
    main(["score", "--model", made.run.dir, "--workers", "0", "--out", f"{folder}/scores"])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """One of everything that a command takes."""
    folder = tmp_path_factory.mktemp("world")
    shapes(folder / "shapes", pairs=240, test=36)
    attack = attack_config(folder / "shapes", folder / "attack", {"badnets": {"attack": "badnets", "pairs": 9}})
    make_attack(attack)
    (folder / "attack.yaml").write_text(yaml.safe_dump(attack))
    run_ranks(train_one, 1, folder)
    made = {
        "evaluation": {"test": f"{folder}/shapes"},
        "data": {"index": f"{folder}/shapes/index", "streams": 4, "workers": 0},
        "train": {"batch_size": 24},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({**made, "model": {"config": MODEL}}))
    (folder / "pairs.csv").write_text("path,caption\n0.png,a red star\n")
    (folder / "pictures").mkdir()
    for place in (folder, folder / "pictures"):
        (place / "0.png").write_bytes(picture(0))
    (folder / "pictures" / "0.txt").write_text("a red star")
    shutil.copy(checkpoint.newest_complete(folder / "run")[0] / "model.safetensors", folder / "weights.safetensors")
    (folder / "review.csv").write_text("shard,position,fingerprint,verdict\n")
    return folder


# The words of every command, with what they name.
TAR, MASK = "shapes/train/00000.tar", "run/masks/epoch_002"
GOOD = {
    "data": {"name": "shapes", "out": "new", "--pairs": "9"},
    "shards from-csv": {"file": "pairs.csv", "--out": "new", "--root": "pictures"},
    "shards from-folder": {"folder": "pictures", "--out": "new"},
    "index": {"paths": TAR, "--out": "new", "--report": "new/report"},
    "attack": {"config": "attack.yaml"},
    "attack show": {"folder": "attack", "--out": "new.png"},
    "config": {"config": "config.yaml"},
    "doctor": {"config": "config.yaml"},
    "train": {"config": "config.yaml", "run.dir=": "new"},
    "evaluate": {"run": "run", "--baseline": "run", "--unpoisoned": "run"},
    "compare": {"clip_run": "run", "safeclip_run": "run", "--out": "new"},
    "export": {"run": "run", "out": "new"},
    "mask show": {"mask": MASK},
    "mask export": {"mask": MASK, "--format": "keys", "--out": "new"},
    "mask export datacomp": {"mask": MASK, "--format": "datacomp", "--out": "new", "--shards": TAR},
    "mask diff": {"a": MASK, "b": MASK, "--out": "new"},
    "mask replay": {"mask": MASK, "--fraction": "0.5", "--out": "new"},
    "mask apply": {"mask": MASK, "shards": TAR, "--out": "new", "--review": "review.csv"},
    "mask filter": {"scores": "scores", "--by": "cosine", "--out": "new"},
    "mask oracle": {"overlay": "attack", "--index": "shapes/index", "--out": "new"},
    "score": {"--model": "run", "--data": "shapes/index", "--overlay": "attack", "--workers": "0", "--out": "new"},
    "score embeddings": {"--embeddings": "scores", "--out": "new"},
    "score open_clip": {"--model": "RN50", "--pretrained": "weights.safetensors", "--data": TAR, "--out": "new"},
    "audit": {"source": "run", "--scores": "scores", "--truth": "attack", "--out": "new"},
}
KEYS = {"data.index=": "shapes/index", "data.overlay=": "attack", "data.mask=": MASK, "model.pretrained=": "run"}
KEYS |= {"evaluation.test=": "shapes", "evaluation.index=": "shapes/test_index", "evaluation.labels=": "shapes/labels"}
KEYS |= {"evaluation.pairs=": "shapes/test_captions", "run.dir=": "new"}
WRONG = {
    "utf16": lambda data: b"\xff\xfe" + data.decode("latin1").encode("utf-16-le"),
    "gzip": gzip.compress,
    "empty": lambda data: b"",
    "another type": lambda data: b"[1]\n",
}
WAYS = ["missing", "file for folder", "below a file", "empty folder", *WRONG]


def spoilt(path, way, tmp_path):
    """A copy of the file or folder `path` that is wrong in this way."""
    bad, is_folder = tmp_path / "bad", path.is_dir()
    if way == "missing":
        return tmp_path / "nowhere"
    if way in ("file for folder", "below a file", "empty folder"):
        if is_folder and way != "empty folder":
            bad.write_bytes(b"a file\n")
        else:
            bad.mkdir()
        return bad / "x" if way == "below a file" and is_folder else bad
    if not path.exists():
        return path
    if is_folder:
        shutil.copytree(path, bad)
    else:
        shutil.copy(path, bad)
    for file in [bad] if bad.is_file() else bad.rglob("*"):
        if file.is_file():
            file.write_bytes(WRONG[way](file.read_bytes()))
    return bad


def sound(*_):
    """In place of a start that has found nothing wrong: it trains in another test."""
    raise UserError("sound")


def outcome(words, capsys):
    """(exit code, stderr); any other error is the test's."""
    try:
        main([str(word) for word in words])
        code = 0
    except SystemExit as end:
        code = end.code or 0
    return code, capsys.readouterr().err


def paths_of(group=safeclip, words=()):
    """(command, name of a parameter that is a path)."""
    for name, one in group.commands.items():
        if isinstance(one, click.Group):
            yield from paths_of(one, (*words, name))
        else:
            yield from ((" ".join((*words, name)), param.opts[0]) for param in one.params if param.type is PATH)


# Options that exclude each other are those of a command of their own.
ALONE = {"show": ("attack", "--out"), "embeddings": ("score", "--embeddings"), "open_clip": ("score", "--pretrained")}
ALONE |= {"datacomp": ("mask export", "--shards")}
CASES = sorted({*paths_of()} - {*ALONE.values()} | {("attack show", "folder")})
CASES += [(f"{command} {word}", name) for word, (command, name) in ALONE.items()]
CASES += [(command, key) for command in ("doctor", "train") for key in KEYS]
CASES.remove(("train", "evaluation.labels="))  # which `safeclip evaluate` reads, and doctor


def line_of(world, command, given):
    """The words of a command with its good values, but for those that are `given`."""
    words = [word for word in command.split() if word == "show" or word not in ALONE]
    for name, value in {**GOOD[command], **given}.items():
        value = world / value if (world / value).exists() else value
        if name.endswith("="):
            words.append(f"{name}{value}")
        else:
            words += [name, value] if name.startswith("-") else [value]
    return words


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("command, name", CASES, ids=lambda value: value.replace(" ", "_"))
def test_a_wrong_file_is_one_line(world, tmp_path, monkeypatch, capsys, command, name, way):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(start, "start_engine", sound)
    good = {**GOOD[command], **KEYS}[name]
    written = good.startswith("new")
    if written and way == "missing":
        pytest.skip("it is to be made")
    bad = spoilt(tmp_path if written else world / good, way, tmp_path)
    code, error = outcome(line_of(world, command, {name: str(bad)}), capsys)
    if code and command != "doctor":  # which prints what it finds
        assert error.startswith("safeclip: ") and error.count("\n") == 1, error
    assert code in (0, 2)
    if way in ("missing", "file for folder") and not written and name != "--root":
        assert code == 2 and error != "safeclip: sound\n"


@pytest.mark.parametrize("command, name", [("index", "paths"), ("score", "--data"), ("mask apply", "shards")])
def test_a_brace_that_does_not_close_is_named(world, tmp_path, monkeypatch, capsys, command, name):
    monkeypatch.chdir(tmp_path)
    code, error = outcome(line_of(world, command, {name: "a/{00..10.tar"}), capsys)
    assert code == 2 and "a/{00..10.tar" in error and "close the brace" in error and error.count("\n") == 1


@pytest.mark.parametrize("command", ["index", "attack", "export", "mask export", "mask apply", "mask oracle"])
def test_a_full_disk_is_one_line_and_leaves_no_part_of_a_file(world, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    words = line_of(world, command, {"out=": "new"} if command == "attack" else {})
    code, error = outcome(words, capsys)
    assert code == 2 and "o space left" in error and error.count("\n") == 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
