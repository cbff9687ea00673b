"""SigLIP's loss and frozen towers under DeepSpeed: at every ZeRO stage, saved and loaded, and on another number of
ranks."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.schema import Train
from pipeline.distributed import comm
from pipeline.training import checkpoint
from pipeline.training import engine as engines
from pipeline.training import run as running
from pipeline.training.model import Towers, build_model, pixel_stats
from pipeline.training.step import train_step
from pipeline.training.support_queue import SupportQueue
from shards.build.shapes import shapes
from shards.order.safe_mask import SafeMask
from shards.storage.files import write_bytes
from shards.views.batch import Batch
from tests.helpers.models import RESNET, SIGMOID, VIT
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import config, cut_off, metrics

ROWS, STAGES = 8, (0, 1, 3)
MODELS = {  # name: (config, frozen towers)
    "frozen text": ({**VIT, "custom_text": True, "init_logit_bias": -3.0}, (False, True)),
    "frozen image": (RESNET, (True, False)),
}


def towers(name):
    made, (image, text) = MODELS[name]
    torch.manual_seed(0)
    towers = Towers(build_model({"config": copy.deepcopy(made)}), *pixel_stats())
    towers.lock(image, text)
    return towers


def batch(name, step):
    """This rank's rows of a global batch of two views."""
    torch.manual_seed(100 + step)
    size, rows = MODELS[name][0]["vision_cfg"]["image_size"], ROWS // comm.world()
    images, tokens = torch.randint(0, 256, (2, ROWS, 3, size, size)), torch.randint(1, 63, (2, ROWS, 8))
    mine = slice(comm.rank() * rows, (comm.rank() + 1) * rows)
    images_BCHW, tokens_BL = images[:, mine].flatten(0, 1).to(torch.uint8), tokens[:, mine].flatten(0, 1)
    return Batch(images_BCHW, tokens_BL, (torch.arange(ROWS) != 2)[mine], torch.arange(ROWS)[mine], [])


def train(name, stage, folder=None):
    """(weights after a clip, a unimodal and a clip step, scales before each). With a folder an engine that is loaded
    from it takes the last step."""
    settings = Train(batch_size=ROWS, lr=1e-2, eps=1e-2, zero_stage=stage)
    engine = engines.start_engine(towers(name), settings, comm.device())
    queues, scales = {kind: SupportQueue(12, 16, comm.device()) for kind in ("image", "text")}, []
    for step, kind in enumerate(("clip", "unimodal", "clip")):
        if folder and step == 2:
            for path, data in engines.serialise(engine, f"{folder}/{name}{stage}").items():
                write_bytes(path, data)
            comm.barrier()
            engine = engines.start_engine(towers(name), settings, comm.device())
            engines.load(engine, f"{folder}/{name}{stage}")
        scales.append(train_step(engine, queues, batch(name, step), kind)[1].tolist())
    return engines.consolidated_state(engine), scales


def train_all(stages, folder=None):
    return {(name, stage): train(name, stage, folder) for name in MODELS for stage in stages}


def whole_and_loaded(folder):
    return train_all(STAGES), train_all(STAGES, folder)


def test_ranks_agree_and_frozen_towers_stand_at_every_stage(tmp_path):
    (one,) = run_ranks(train_all, 1, (0,))
    two, resumed = run_ranks(whole_and_loaded, 2, str(tmp_path))[0]
    for (name, stage), (weights, scales) in two.items():
        start, expected = towers(name).clip.state_dict(), one[name, 0]
        image, text = MODELS[name][1]
        assert torch.tensor(scales).sub(torch.tensor(expected[1])).abs().max() < 1e-4
        for key, value in weights.items():
            torch.testing.assert_close(value, expected[0][key], rtol=1e-5, atol=1e-5, msg=f"{name} {stage} {key}")
            assert torch.equal(value, resumed[name, stage][0][key]), f"{name} {stage} {key}"
        # A timm tower's head is trained, as in open_clip; its batch norm's statistics are frozen.
        frozen = {key for key in start if image and key.startswith("visual.trunk.")}
        frozen |= {key for key in start if text and not key.startswith(("visual.", "logit_"))}
        moved = {key for key in start if not torch.equal(start[key], weights[key])}
        assert not frozen & moved and len(moved) > 3 and "logit_scale" in moved, (name, stage)
        assert ("logit_bias" in moved) == ("logit_bias" in start), (name, stage)


def free_scale(stage):
    """The scale after a step from above 100, which CLIP's is clamped to."""
    model = towers("frozen text")
    model.clip.logit_scale.data.fill_(5.0)
    engine = engines.start_engine(model, Train(batch_size=ROWS, lr=0.0, zero_stage=stage), comm.device())
    engines.set_lr(engine, 0.0)
    return [train_step(engine, {}, batch("frozen text", 0), "clip")[1].tolist() for _ in range(2)][1]


def free_scales():
    return [free_scale(stage) for stage in (1, 3)]


def test_a_scale_with_a_bias_is_not_clamped():
    for scale, bias in run_ranks(free_scales, 1)[0]:
        assert scale == pytest.approx(148.413, rel=1e-4) and bias == pytest.approx(-3)


def make_run(folder, name):
    """preset=default of a small SigLIP with a frozen image tower, at ZeRO-3: 10 unimodal steps, a selection round, 10
    steps."""
    made = config(folder, name, train__zero_stage=3, train__epochs=2, train__low_rate_epochs=0)
    made.model.config = copy.deepcopy(SIGMOID)
    made.model.pretrained, made.model.lock_image = str(folder / "image.safetensors"), True
    return made


def begin(folder):
    running.train(make_run(folder, "whole"))
    cut_off(make_run(folder, "cut"), 14)


def end(folder):
    running.LOG_EVERY = 1
    running.train(make_run(folder, "cut"))


def test_a_siglip_with_a_frozen_tower_selects_and_resumes_on_fewer_ranks(tmp_path):
    shapes(tmp_path / "shapes", pairs=240, test=36)
    image = {n: v for n, v in build_model({"config": SIGMOID}).state_dict().items() if n.startswith("visual.")}
    save_file(image, tmp_path / "image.safetensors")
    run_ranks(begin, 2, tmp_path)
    run_ranks(end, 1, tmp_path)
    whole, cut = make_run(tmp_path, "whole"), make_run(tmp_path, "cut")
    ends = [checkpoint.newest_complete(made.run.dir)[0] for made in (whole, cut)]
    one, two = (load_file(folder / "model.safetensors") for folder in ends)
    assert ends[0].name == ends[1].name == "step_00000020"
    for name, value in one.items():
        assert not name.startswith("visual.") or torch.equal(value, image[name]) and torch.equal(two[name], image[name])
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-3)
    masks = [SafeMask.load(f"{made.run.dir}/masks/epoch_001")[0].flags() for made in (whole, cut)]
    assert masks[0].sum() > 80 and (masks[0] != masks[1]).sum() <= 4
    stages = {row["stage"]: row for row in metrics(cut) if "loss" in row}
    assert "logit_bias" in stages["safeclip"] and stages["safeclip"]["logit_bias"] != -10
