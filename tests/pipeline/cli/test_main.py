"""The program as users run it: data, attack, 2 processes, death and resume, evaluation, export; and what they get
wrong."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml

from pipeline.cli import main
from shards.errors import ChangedShard, Unreachable, UserError
from shards.index.build_index import build_index
from shards.index.shard_index import ShardIndex
from shards.order.safe_mask import SafeMask
from shards.samples.bad_samples import read_bad_samples
from shards.samples.samples import Samples
from tests.helpers.models import MODEL
from tests.helpers.pictures import picture
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import TIMED, command, safeclip
from tests.helpers.tars import write_tar


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with poisoned shapes, a config, and a finished run of 4 epochs by 2 processes."""
    folder = tmp_path_factory.mktemp("world")
    safeclip("data", "shapes", "shapes", "--pairs", 240, cwd=folder)
    attack = {
        "index": "shapes/index",
        "labels": "shapes/labels",
        "test": "shapes/test_index",
        "classnames": "shapes/classnames.txt",
        "out": "attack",
        "attacks": {
            "single_target": {"attack": "single_target", "targets": 2, "captions": 3},
            "badnets": {"attack": "badnets", "pairs": 5},
        },
    }
    (folder / "attack.yaml").write_text(yaml.safe_dump(attack))
    safeclip("attack", "attack.yaml", cwd=folder)
    config = {
        "preset": "default",
        "data": {"index": "shapes/index", "overlay": "attack", "workers": 0, "streams": 4, "window": 64},
        "model": {"config": MODEL},
        "evaluation": {"test": "shapes"},
        "train": {
            "epochs": 4,
            "unimodal_epochs": 1,
            "low_rate_epochs": 1,
            "steps_before_selection": 0,
            "batch_size": 24,
            "warmup_steps": 5,
            "support_queue": 64,
        },
        "selection": {
            "batch_size": 32,
            "first_fraction": 0.4,
            "growth": 0.1,
            "every": 1,
            "risky": "unimodal",
            "refill": False,
        },
        "wandb": {"mode": "offline"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    safeclip("train", "config.yaml", "run.dir=whole", processes=2, cwd=folder)
    return folder


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_promises(world):
    run, metrics = world / "whole", lines(world / "whole")
    assert [m["stage"] for m in metrics if "eval" in m] == ["unimodal", "low_rate", "safeclip", "safeclip"]
    fractions = [round(m["fraction"], 2) for m in metrics if m["stage"] == "selection"]
    assert fractions == [0.39, 0.49]  # of all pairs, six of which a guard excludes
    assert all({"step", "epoch", "stage"} <= m.keys() for m in metrics)
    mask, meta = SafeMask.load(run / "masks" / "epoch_002")
    assert (
        meta["diagnosis"]["negative_controls"]["count"]
        == len(np.load(run / "masks/epoch_002/negative_controls.npy"))
        == 120
    )
    assert meta["mixture"] and meta["fraction"] == mask.fraction == 94 / 240 and meta["step"] == 20
    excluded, about = SafeMask.load(run / "masks/guards/duplicates")
    assert excluded.counts("risky").sum() == meta["diagnosis"]["excluded"] == 6  # two targets, each in three pairs
    assert about["settings"] == {"max_pairs": 2} and not (mask.bits & ~excluded.bits).any()
    assert list((run / "wandb").glob("offline-run-*"))
    assert not (run / "bad_samples").exists()


def test_the_mask_is_the_top_of_the_saved_scores(world):
    from pipeline.safety.score_files import load_scores

    folder = world / "whole" / "masks" / "epoch_003"
    mask, meta = SafeMask.load(folder)
    score, safe = load_scores(folder, [240]), mask.flags()
    assert score[safe].min() == pytest.approx(meta["threshold"]) and np.nanmax(score[~safe]) <= score[safe].min()


def test_a_mask_is_rebuilt_without_its_run(world, tmp_path):
    shutil.copytree(world / "whole" / "masks" / "epoch_003", tmp_path / "mask")
    assert "bit for bit the saved mask" in safeclip("mask", "replay", "mask", cwd=tmp_path).stdout
    shards = [world / "shapes" / "train" / "00000.tar"]
    assert "117 safe of 240 samples" in safeclip("mask", "apply", "mask", *shards, "--out", "safe", cwd=tmp_path).stdout


def test_a_run_cut_off_after_an_epoch_ends_as_if_it_never_was(world):
    """The last checkpoint is lost, with half a line of metrics and half a mask left behind."""
    run = world / "resumed"
    shutil.copytree(world / "whole", run)
    newest = max((run / "checkpoints").iterdir())
    (newest / "COMPLETE").unlink()
    shutil.rmtree(run / "masks" / "epoch_003" / "scores")
    (run / "masks" / "epoch_003" / "mask.json").unlink()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "ep')
    run_ranks(command, 2, world, "train", "config.yaml", "run.dir=resumed")
    name = f"checkpoints/{newest.name}/model.safetensors"
    assert (run / name).read_bytes() == (world / "whole" / name).read_bytes()
    assert [{k: v for k, v in m.items() if k not in TIMED} for m in lines(run)] == [
        {k: v for k, v in m.items() if k not in TIMED} for m in lines(world / "whole")
    ]
    assert len({path.name.rsplit("-", 1)[1] for path in (run / "wandb").glob("offline-run-*")}) == 1  # one W&B run


def test_a_round_does_not_depend_on_the_world_size(world, make_shards):
    """Shards of uneven sizes, scored with one model by 1, 2 and 8 processes: the same cosines, mixture and mask, bit
    for bit."""
    build_index([str(path) for path in make_shards([50, 0, 7, 33, 90])], world / "uneven" / "index")
    results = [run_ranks(scored_round, world_size, str(world)) for world_size in (1, 2, 8)]
    ((cos1, mixture1, safe1),) = results[0]
    for cos, mixture, safe in sum(results[1:], []):
        np.testing.assert_array_equal(cos, cos1)
        assert mixture == mixture1 and np.array_equal(safe, safe1)


def scored_round(folder):
    import torch

    from pipeline.evaluation.run import load_run
    from pipeline.safety.round import select_pairs
    from pipeline.safety.scoring import score_all_pairs
    from pipeline.training.start import make_views

    os.chdir(folder)
    config, _, towers = load_run("whole")
    index = ShardIndex.load("uneven/index")
    cos, bad = score_all_pairs(towers, Samples(index), make_views(config), 32, torch.device("cpu"))
    selected = select_pairs(cos, index.counts, config.selection, 0)
    return cos, selected.mixture, selected.mask.flags()


def test_a_run_is_evaluated(world, monkeypatch, capsys):
    safeclip("evaluate", "whole", cwd=world)
    result = json.loads((world / "whole" / "eval.json").read_text())
    # A step of the unimodal loss sees two views of each pair: 10 of them, 10 at the low rate, then 3 on safe and 6 on
    # risky pairs, 4 and 5.
    assert result["epochs"] == 4 and result["sample_views"] == 24 * (20 + 10 + 3 + 12 + 4 + 10)
    told = [row["eval"] for row in lines(world / "whole") if "eval" in row][-1]  # after the last epoch
    for key in ("clean_top1", "clean_top5", "retrieval"):
        assert result[key] == told[key]
    # Duplicates are trained on in no epoch but the low-rate one; the other triggers are in too few pictures for a
    # cluster.
    trained = {kind: attack["fraction_trained_on"] for kind, attack in result["attacks"].items()}
    masks = [SafeMask.load(world / "whole" / "masks" / f"epoch_{number:03d}")[0].flags() for number in (2, 3)]
    poison = json.loads((world / "attack" / "manifest.json").read_text())["rows"]
    assert trained["single_target"] == 0
    for name, attack in result["attacks"].items():
        rows = [row["position"] for row in poison if row["kind"] == name]  # there is one shard
        assert trained[name] == np.mean((masks[0] | masks[1])[rows])
        assert attack["fraction_in_safe_set"] == pytest.approx([mask[rows].mean() for mask in masks])
        assert attack["took"] is None and len(attack["auroc"]) == 2
        for rate in ("success", "base", "true_class"):
            assert attack[rate] == told["attacks"][name][rate]
    overrides = ("preset=clip", "data.overlay=null", "train.epochs=1", "evaluation.every=0")
    run_ranks(command, 1, world, "train", "config.yaml", "run.dir=innocent", *overrides)
    monkeypatch.chdir(world)
    main.main(["evaluate", "whole", "--unpoisoned", "innocent", "innocent"])
    again = json.loads((world / "whole" / "eval.json").read_text())
    assert all(attack["unpoisoned"] is None for attack in result["attacks"].values())
    main.main(["evaluate", "innocent", "data.overlay=attack"])
    innocent = json.loads((world / "innocent" / "eval.json").read_text())["attacks"]
    for name, attack in again["attacks"].items():  # the mean of twice the same
        assert attack["unpoisoned"] == pytest.approx(innocent[name]["success"])
        assert attack["unpoisoned_true_class"] == pytest.approx(innocent[name]["true_class"])
    assert again["clean_top1"] == result["clean_top1"]
    with pytest.raises(SystemExit, match="2"):
        main.main(["evaluate", "whole", "--unpoisoned", "whole"])
    assert "was trained with data.overlay=attack" in capsys.readouterr().err


def test_the_export_is_the_runs_model_in_open_clip(world, monkeypatch, capsys):
    import open_clip
    import torch

    from pipeline.evaluation.run import load_run

    monkeypatch.chdir(world)
    main.main(["export", "whole", "exported"])
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{world}/exported")
    _, _, towers = load_run("whole")
    tokens = open_clip.get_tokenizer(f"local-dir:{world}/exported")(["a red star"])
    torch.testing.assert_close(model.eval().encode_text(tokens, normalize=True), towers(None, tokens)[1])
    assert preprocess is not None and model.logit_scale.shape == ()
    main.main(["export", "whole", "hf", "--format", "transformers"])
    assert "CLIPModel" in capsys.readouterr().out
    assert {path.name for path in (world / "hf").iterdir()} >= {"config.json", "model.safetensors", "vocab.json"}


@pytest.mark.parametrize(
    "words, names",
    [
        (["train", "config.yaml", "run.dir=x", "train.batchsize=3"], "train.batch_size"),
        (["train", "config.yaml", "run.dir=x", "data.index=nowhere"], "nowhere"),
        (["train", "config.yaml", "run.dir=x", "train.batch_size=1000"], "train.batch_size"),
        (["train", "config.yaml", "run.dir=whole", "run.seed=5"], "run.dir"),
        (["train", "config.yaml"], "run.dir"),
        (["train", "config.yaml", "run.dir=x", "model={name: RN51}"], "RN50"),
        (["train", "config.yaml", "run.dir=x", "data.overlay=nowhere"], "safeclip attack"),
        (["train", "config.yaml", "run.dir=x", "evaluation.test=nowhere"], "evaluation.test"),
        (["index", "nowhere/{0..3}.tar", "--out", "x"], "nowhere/0.tar"),
        (["evaluate", "nowhere"], "nowhere"),
        (["export", "nowhere", "x"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(world, monkeypatch, capfd, words, names):
    monkeypatch.chdir(world)
    with pytest.raises(SystemExit, match="2"):
        main.main(words)
    said = capfd.readouterr().err
    assert names in said and said.count("\n") == 1 and "Traceback" not in said, said


def test_so_is_one_that_is_found_after_all_imports_of_a_process(world):
    done = safeclip("train", "config.yaml", "run.dir=whole", "run.seed=5", cwd=world, check=False)
    assert done.returncode == 2 and "run.dir" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_batch_that_the_processes_do_not_divide_is_named_once(world):
    done = safeclip(
        "train",
        "config.yaml",
        "run.dir=odd",
        "train.batch_size=25",
        "data.streams=5",
        processes=2,
        cwd=world,
        check=False,
    )
    assert (
        done.returncode != 0
        and done.stderr.count("safeclip: train.batch_size: got 25, which 2 processes do not divide") == 1
    )


def test_bad_samples_are_recorded_and_the_run_continues(world, tmp_path):
    members = []
    for i in range(16):
        members += [
            (f"{i:02d}.png", picture(i) if i != 3 else b"no picture"),
            (f"{i:02d}.txt", b"a red star" if i != 5 else b"\xff\xfe"),
        ]
    members = [m for m in members if m[0] not in ("07.txt", "09.png")]
    build_index([str(write_tar(tmp_path / "bad.tar", members))], tmp_path / "index")
    words = [f"run.dir={tmp_path}/run", f"data.index={tmp_path}/index", "data.overlay=", "train.batch_size=4"]
    words += ["evaluation.test=", "selection.first_fraction=0.5"]
    words += ["wandb.mode=disabled", "data.max_bad_fraction=0.3"]
    run_ranks(command, 2, world, "train", "config.yaml", *words)
    rows = list(read_bad_samples(tmp_path / "run" / "bad_samples"))
    assert {(r["position"], r["reason"]) for r in rows} == {
        (3, "picture is of no known format, expected JPEG, PNG, WebP, GIF"),
        (5, "caption is not UTF-8 (byte 0)"),
        (7, "no caption"),
        (9, "no picture"),
    }
    assert len(rows) == 4 and ": done, " in (tmp_path / "run/logs/rank_0.log").read_text()
    assert not SafeMask.load(tmp_path / "run" / "masks" / "epoch_002")[0].flags()[[3, 5, 7, 9]].any()


def test_a_shard_that_changed_is_refused(world, tmp_path, monkeypatch, capsys):
    shutil.copy(world / "shapes" / "train" / "00000.tar", tmp_path / "a.tar")
    build_index([str(tmp_path / "a.tar")], tmp_path / "index")
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[-1] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    monkeypatch.chdir(world)
    with pytest.raises(SystemExit, match="2"):
        main.main(["train", "config.yaml", f"run.dir={tmp_path}/run", f"data.index={tmp_path}/index", "data.overlay="])
    said = capsys.readouterr().err
    assert "a.tar" in said and "were indexed" in said


@pytest.mark.parametrize("error, said", [(ChangedShard, True), (Unreachable, True), (UserError, False)])
def test_what_one_rank_alone_may_find_is_said_by_any_rank(monkeypatch, capsys, error, said):
    def invoke(context):
        raise error(
            f"Caught {error.__name__} in a reading process.\nTraceback:\n  shards.errors.{error.__name__}: shard a"
        )

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(main.safeclip, "invoke", invoke)
    with pytest.raises(SystemExit, match="2"):
        main.main(["config"])
    assert re.fullmatch(r"safeclip: rank 1 \S+: shard a\n" if said else "", capsys.readouterr().err)


def test_help_needs_no_heavy_package():
    code = (
        "import sys, pipeline.cli.main as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]") and "safeclip train" in done.stdout
