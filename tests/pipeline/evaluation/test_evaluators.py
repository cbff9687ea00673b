"""Named evaluators on held-out pairs, which have no labels: their figures, their data, and a run that has no other."""

import json
import math
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from torch.nn import functional as F

from pipeline.cli.main import main
from pipeline.config.schema import Config, Evaluation
from pipeline.evaluation.evaluators import REGISTRY, Evaluators
from pipeline.evaluation.evaluators.loss import BATCH, contrastive_loss
from pipeline.training.model import Towers, build_model, pixel_stats, tokenizer_for
from shards.build.shapes import shapes
from shards.errors import UserError
from shards.index.build_index import build_index
from shards.views.batch import Views
from tests.helpers.models import MODEL
from tests.helpers.pictures import picture
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import command
from tests.helpers.tars import write_tar

BAD = {2: "picture", 9: "caption", 11: "both"}  # of the pairs of `held_out`


def pair(number, bad=""):
    """Members of a tar; every fifth pair has the same caption."""
    text = b"\xff\xfe" if bad in ("caption", "both") else f"caption {number % 5 and number}".encode()
    return [
        (f"{number:03d}.png", b"no picture" if bad in ("picture", "both") else picture(number)),
        (f"{number:03d}.txt", text),
    ]


def write_pairs(folder, bad, rows=range(20)):
    """The index of these pairs, in two shards."""
    rows, paths = list(rows), []
    folder.mkdir(parents=True)
    for shard, some in enumerate((rows[:7], rows[7:])):
        members = [member for number in some for member in pair(number, bad.get(number, ""))]
        paths.append(str(write_tar(folder / f"{shard}.tar", members)))
    build_index(paths, folder / "index", workers=1)
    return str(folder / "index")


@pytest.fixture
def held_out(tmp_path):
    """The index of 20 pairs, three of which cannot be read."""
    return write_pairs(tmp_path / "held_out", BAD)


def figures_of(index, model=MODEL, **changes):
    """Figures of a model of fixed weights on the pairs of an index, and their line in the log."""
    config = Config(evaluation=Evaluation(pairs=index, **changes))
    config.data.workers = 0
    torch.manual_seed(0)
    towers = Towers(build_model({"config": model}), *pixel_stats())
    evaluators = Evaluators(config)
    figures = evaluators(towers, Views(16, tokenizer_for({"config": MODEL}), {}), torch.device("cpu"))
    return figures, evaluators.line(figures)


@pytest.mark.parametrize("count, used", [(1, 1), (7, 7), (8, 8), (15, 8), (16, 16), (21, 16)])
def test_the_loss_is_clips_over_whole_batches(count, used):
    torch.manual_seed(count)
    image_ND, text_ND = (F.normalize(torch.randn(count, 6), dim=1) for _ in range(2))
    scale = torch.tensor([7.0])
    expected, theirs = [], open_clip.ClipLoss()
    for at in range(0, used, 8):
        images_BD, texts_BD = image_ND[at:used][:8], text_ND[at:used][:8]
        logits_BB, own_B = 7.0 * images_BD @ texts_BD.T, range(len(images_BD))
        rows = -sum(logits_BB.log_softmax(1)[i, i] for i in own_B) / len(own_B)
        columns = -sum(logits_BB.log_softmax(0)[i, i] for i in own_B) / len(own_B)
        assert float(rows + columns) / 2 == pytest.approx(float(theirs(images_BD, texts_BD, scale)), rel=1e-5)
        expected.append(float(rows + columns) / 2)
    assert contrastive_loss(image_ND, text_ND, scale, 8) == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_the_loss_of_embeddings_that_tell_nothing_is_that_of_chance():
    same_ND = torch.ones(2 * BATCH, 4) / 2
    assert contrastive_loss(same_ND, same_ND, torch.tensor([10.0])) == pytest.approx(math.log(BATCH))


def test_one_and_two_ranks_give_the_same_figures(held_out):
    alone = figures_of(held_out)
    assert run_ranks(figures_of, 2, held_out) == [alone, alone]


def test_bad_pairs_are_counted_and_in_no_figure(held_out, tmp_path):
    rest = [number for number in range(20) if number not in BAD]
    found, without = figures_of(held_out)[0], figures_of(write_pairs(tmp_path / "rest", {}, rest))[0]
    assert found["pairs"].pop("unreadable") == 3 and without["pairs"].pop("unreadable") == 0
    assert found["pairs"]["count"] == 17
    assert found["pairs"].pop("loss") == pytest.approx(without["pairs"].pop("loss"), rel=1e-5)
    assert found == without


def test_a_logit_bias_changes_no_figure(held_out):
    biased = {**MODEL, "init_logit_bias": -10, "init_logit_scale": math.log(1 / 0.07)}
    assert figures_of(held_out, biased) == figures_of(held_out)


def test_a_figure_of_no_pair_is_none(tmp_path):
    bad = dict.fromkeys(range(20), "picture") | {3: ""}
    figures, line = figures_of(write_pairs(tmp_path / "held_out", bad), max_pairs=3)  # the index itself refuses none
    assert figures == {"pairs": {"count": 0, "unreadable": 3, "loss": None, "retrieval": None}}
    assert line == "held-out loss ?, R@1 ?"
    bad = dict.fromkeys(range(20), "caption") | {3: ""}
    assert figures_of(write_pairs(tmp_path / "no captions", bad), max_pairs=3)[0] == figures


def test_the_first_pairs_are_used(held_out, tmp_path):
    first = write_pairs(tmp_path / "first", BAD, range(12))
    found, alone = figures_of(held_out, max_pairs=12)[0]["pairs"], figures_of(first)[0]["pairs"]
    assert found.pop("loss") == pytest.approx(alone.pop("loss"), rel=1e-5) and found == alone
    assert found["count"] == 9


def test_only_the_evaluators_that_are_named_are_run(held_out):
    assert figures_of(held_out, evaluators=["loss"])[0]["pairs"].keys() == {"count", "unreadable", "loss"}
    assert figures_of(held_out, evaluators=[]) == ({}, "")
    figures, line = figures_of(held_out, evaluators=["retrieval", "loss", "retrieval"])
    assert figures == figures_of(held_out)[0] and line.startswith("R@1 ") and line.count("R@1") == 1


@pytest.mark.parametrize(
    "name, key", [("zero_shot", "evaluation.test=DIR"), ("attacks", "data.overlay=DIR"), ("nothing", "zero_shot")]
)
def test_an_evaluator_without_its_data_is_refused(held_out, name, key):
    with pytest.raises(UserError, match=f"^evaluation.evaluators: .*{name}.*{key}"):
        Evaluators(Config(evaluation=Evaluation(pairs=held_out, evaluators=["loss", name])))


@pytest.mark.parametrize("name", ["loss", "retrieval"])
def test_without_held_out_pairs_evaluators_of_them_are_refused(name):
    with pytest.raises(UserError, match=f"^evaluation.evaluators: {name} needs held-out pairs"):
        Evaluators(Config(evaluation=Evaluation(evaluators=[name])))
    assert Evaluators(Config()).chosen == []


def test_shards_that_are_trained_on_are_refused(held_out, tmp_path):
    config, shard = Config(evaluation=Evaluation(pairs=held_out)), Path(held_out).parent / "1.tar"
    (tmp_path / "copy.tar").write_bytes(shard.read_bytes())
    trained = build_index([str(tmp_path / "copy.tar")], tmp_path / "trained", workers=1)
    with pytest.raises(UserError, match=f"^evaluation.pairs: 1 of the 2 shards .* the first: {shard};"):
        Evaluators(config, trained)
    write_tar(tmp_path / "copy.tar", pair(99))
    Evaluators(config, build_index([str(tmp_path / "copy.tar")], tmp_path / "trained", workers=1))


def test_labels_are_no_captions_and_a_missing_shard_is_refused(held_out, tmp_path):
    write_tar(tmp_path / "labels.tar", [("0.png", picture(0)), ("0.cls", b"1")])
    build_index([str(tmp_path / "labels.tar")], tmp_path / "labels", text="cls", workers=1)
    with pytest.raises(UserError, match="^evaluation.pairs: .* indexes labels, expected captions"):
        Evaluators(Config(evaluation=Evaluation(pairs=str(tmp_path / "labels"))))
    (Path(held_out).parent / "0.tar").unlink()
    with pytest.raises(UserError, match="0.tar: missing"):
        Evaluators(Config(evaluation=Evaluation(pairs=held_out)))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shapes without any label or class name, and a run of 2 processes under ZeRO-3, evaluated after every epoch."""
    folder = tmp_path_factory.mktemp("world")
    shapes(folder / "made", pairs=120, test=320)
    for name, shards in (("train", "made/train/*.tar"), ("held_out", "made/test/*.tar")):
        build_index(sorted(map(str, folder.glob(shards))), folder / name, workers=1)
    config = {
        "preset": "clip",
        "data": {"index": "train", "workers": 1, "streams": 4, "window": 64},
        "model": {"config": MODEL},
        "evaluation": {"pairs": "held_out", "max_pairs": 300},
        "train": {"epochs": 2, "batch_size": 24, "warmup_steps": 5, "zero_stage": 3},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    run_ranks(command, 2, folder, "train", "config.yaml", "run.dir=run")
    return folder


def test_a_run_without_labels_is_validated_after_every_epoch(world):
    lines = [json.loads(line) for line in (world / "run/metrics.jsonl").read_text().splitlines()]
    found = [(line["epoch"], line["eval"]) for line in lines if "eval" in line]
    assert [epoch for epoch, _ in found] == [0, 1]
    for _, figures in found:
        assert figures.keys() == {"pairs"} and figures["pairs"]["count"] == 300
        assert 0 < figures["pairs"]["loss"] < 2 * math.log(BATCH)
    assert found[0][1]["pairs"]["loss"] != found[1][1]["pairs"]["loss"]
    assert "eval: held-out loss " in (world / "run/logs/rank_0.log").read_text()


def test_evaluate_gives_the_figures_of_the_last_epoch(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    main(["evaluate", "run"])
    said, found = capsys.readouterr().out, json.loads(Path("run/eval.json").read_text())
    *_, last = (json.loads(line) for line in open("run/metrics.jsonl"))
    told = last["eval"]["pairs"]
    assert found["pairs"]["loss"] == pytest.approx(told["loss"], rel=1e-5)
    assert found["pairs"]["retrieval"] == told["retrieval"] and found["pairs"]["count"] == told["count"]
    assert said.startswith(f"run: 300 held-out pairs: loss {told['loss']:.4f}\n") and "text to image: R@1" in said
    assert all(found[key] is None for key in ("clean_top1", "clean_top5", "retrieval", "linear_probe"))
    assert found["attacks"] == {}


@pytest.mark.parametrize(
    "words, told",
    [
        (["train", "config.yaml", "evaluation.evaluators=[loss,zero_shot]"], "evaluation.evaluators: zero_shot needs "),
        (["train", "config.yaml", "evaluation.evaluators=loss"], "evaluation.evaluators: got 'loss', expected a list"),
        (["train", "config.yaml", "evaluation.pairs=train"], "evaluation.pairs: 1 of the 1 shards of train are "),
        (["evaluate", "run", "evaluation.pairs=null"], "evaluation: nothing to evaluate; name held-out pairs"),
    ],
)
def test_what_cannot_be_evaluated_is_told_in_one_line(world, monkeypatch, capsys, words, told):
    monkeypatch.chdir(world)
    with pytest.raises(SystemExit, match="2"):
        main([*words, *(["run.dir=new"] if words[0] == "train" else [])])
    error = capsys.readouterr().err
    assert error.startswith(f"safeclip: {told}") and error.count("\n") == 1
    assert not Path("new").exists()


def test_every_evaluator_says_what_it_needs():
    assert all(kind.name == name and "evaluation." in kind.needs for name, kind in REGISTRY.items())
