"""On real GPUs, where there are any: NCCL, every ZeRO stage in fp32 and bf16, resume, and the same numbers as on the
CPU.

The rest of the suite never sees a GPU (tests/conftest.py); these give it back to the processes they start, on up to two
of them.
"""

import json
import os
import shutil

import numpy as np
import pytest
import torch

from pipeline.distributed import comm
from pipeline.safety.score_files import ScoreFiles
from pipeline.safety.scoring import score_all_pairs
from pipeline.training import run as running
from pipeline.training.start import Run
from shards.build.shapes import shapes
from shards.samples.colour import as_numbers, coloured_batch
from shards.views.augment import ImageAugment, drawn_view, sample_rng
from tests.helpers.gpus import hidden
from tests.helpers.models import RESNET
from tests.helpers.pictures import smooth_picture
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import config, cut_off, metrics, weights

GPUS = hidden()
pytestmark = pytest.mark.skipif(not GPUS, reason="no GPU here")
WORLD = min(len(GPUS), 2)


@pytest.fixture(autouse=True)
def seen(monkeypatch):
    """Processes that are started from here see the GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(GPUS[:WORLD]))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    shapes(folder / "shapes", pairs=240, test=36)
    return folder


def whole_and_cut(folder, precision, stage, augment_on):
    assert comm.device().type == "cuda" and torch.distributed.get_backend() == "nccl"
    for name in ("whole", "cut"):
        made = on_gpu(folder, name, precision, stage, augment_on)
        if name == "cut":
            cut_off(made, 7)  # in the unimodal epoch
            cut_off(made, 14, times=2)  # in the first epoch with a selection round
        running.train(made)


def on_gpu(folder, name, precision, stage, augment_on):
    name = f"{name}_{precision}_{stage}_{augment_on}"
    changes = {"train__precision": precision, "train__zero_stage": stage, "data__augment_on": augment_on}
    return config(folder, name, **changes)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage, augment_on", [(0, "device"), (1, "worker"), (2, "device"), (3, "worker")])
def test_resume_gives_the_bits_of_a_run_that_was_not_cut_off(data, precision, stage, augment_on):
    words = precision, stage, augment_on
    run_ranks(whole_and_cut, WORLD, data, *words, timeout=120)
    whole, cut = (on_gpu(data, name, *words) for name in ("whole", "cut"))
    assert metrics(whole) == metrics(cut)
    assert weights(whole) == weights(cut)


def batch_norm(folder, precision, stage):
    made = on_gpu(folder, "resnet", precision, stage, "worker")
    made.model.config = json.loads(json.dumps(RESNET)) | {"text_cfg": made.model.config["text_cfg"]}
    made.train.batch_size = 96
    running.train(made)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_batch_norm_trains_at_every_stage(data, precision, stage):
    run_ranks(batch_norm, WORLD, data, precision, stage, timeout=120)
    rows = metrics(on_gpu(data, "resnet", precision, stage, "worker"))
    assert rows and all(np.isfinite(row["loss"]) for row in rows if "loss" in row)


def scored(folder, name):
    """(float32 (N,) scores of a fresh model's pairs, where they were made)."""
    run = Run(config(folder, name))
    run.saver.wait()
    run.engine.eval()
    arguments = run.engine, run.samples, run.views, 32, run.device
    files = ScoreFiles(run.run_dir / "masks" / "scores", run.index, 0)
    with torch.no_grad():
        score_N, _ = score_all_pairs(*arguments, 0, files)
    return np.array(score_N), run.device.type


def test_pairs_get_the_scores_that_they_get_on_the_cpu(data, monkeypatch):
    (here, place), *_ = run_ranks(scored, WORLD, data, "here")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (there, other), *_ = run_ranks(scored, WORLD, data, "there")
    assert (place, other) == ("cuda", "cpu")
    # The embeddings of a fresh model are nearly equal.
    assert np.ptp(there) > 0.01 and np.median(np.abs(here - there)) < 0.02 * there.std() + 1e-3
    assert np.corrcoef(here, there)[0, 1] > 0.99


def pixels(device):
    """{what: uint8 (N, C, H, W)}: every change of pixels that is made on the device."""
    augment = ImageAugment()
    drawn = [drawn_view(smooth_picture(n), 32, sample_rng(0, 0, 0, n, 1), augment) for n in range(64)]
    images = torch.from_numpy(np.stack([image.transpose(2, 0, 1) for image, _ in drawn])).to(device)
    numbers = torch.from_numpy(np.stack([as_numbers(colour) for _, colour in drawn])).to(device)
    return {"colours": coloured_batch(images, numbers).cpu()}


def pixels_on_gpu():
    return pixels(comm.device())


def test_pictures_are_changed_as_on_the_cpu():
    here, there = run_ranks(pixels_on_gpu, WORLD)[0], pixels("cpu")
    for name, image in there.items():
        off = (image.int() - here[name].int()).abs()
        # Hue is discontinuous: a rounding may move single pixels far.
        assert (off > 1).float().mean() < 2e-2, name


def on_the_cpu(folder):
    made = config(folder, "moved", train__zero_stage=0)
    cut_off(made, 14)


def on_the_gpu(folder):
    running.train(config(folder, "moved", train__zero_stage=0))


def test_a_run_begun_on_the_cpu_resumes_on_the_gpu(data, monkeypatch):
    with monkeypatch.context() as hidden:
        hidden.setenv("CUDA_VISIBLE_DEVICES", "")
        run_ranks(on_the_cpu, WORLD, data)
        shutil.copytree(data / "moved", data / "stayed")
    run_ranks(on_the_gpu, WORLD, data)
    rows = [json.loads(line) for line in open(data / "moved" / "metrics.jsonl")]
    assert os.path.exists(data / "moved" / "checkpoints" / "step_00000040") and rows[-1]["step"] == 40
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)
