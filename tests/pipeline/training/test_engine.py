"""N ranks train what one rank with the whole batch trains, at every ZeRO stage, for every loss."""

import itertools
import math
import os
import sys

import pytest
import torch
from timm.layers.norm_act import SyncBatchNormAct
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.config.schema import Train
from pipeline.distributed import comm
from pipeline.training import engine as engines
from pipeline.training.batchnorm import share_batch_norm
from pipeline.training.losses import clip_loss
from pipeline.training.model import MAX_LOG_SCALE
from pipeline.training.step import train_step
from pipeline.training.support_queue import SupportQueue
from shards.storage.files import write_bytes
from tests.helpers.models import RESNET, VIT
from tests.helpers.ranks import run_ranks
from tests.helpers.steps import KINDS, ROWS, global_batch, own_rows, towers

STEPS = 2


def train(stages, precision="fp32", config=VIT):
    """{(stage, loss kind): (losses, weights after the steps)} on this rank."""
    results = {}
    for stage in stages:
        for kind in KINDS:
            # A large eps: where a true gradient is 0 (the keys' bias) Adam would step by the sign of its rounding
            # error.
            settings = Train(batch_size=ROWS, lr=1e-2, eps=1e-2, zero_stage=stage, precision=precision)
            engine = engines.start_engine(towers(config), settings, comm.device())
            queues = {name: SupportQueue(12, 16, comm.device()) for name in ("image", "text")}
            losses = []
            for step in range(STEPS):
                batch = own_rows(global_batch(kind, config["vision_cfg"]["image_size"], step))
                losses.append(comm.mean(train_step(engine, queues, batch, "clip" if kind == "crossed" else kind)[0]))
            results[stage, kind] = losses, engines.consolidated_state(engine)
    return results


def check_equal(many, one):
    for key, (losses, weights) in one.items():
        assert many[key][0] == pytest.approx(losses, rel=1e-5), key
        for name, value in weights.items():
            torch.testing.assert_close(many[key][1][name], value, rtol=1e-5, atol=1e-5, msg=f"{key} {name}")


def test_two_ranks_are_one_rank_with_the_whole_batch_at_every_stage():
    (one,) = run_ranks(train, 1, [0, 1, 2, 3])
    two = run_ranks(train, 2, [0, 1, 2, 3])[0]
    check_equal(two, one)
    for stage in (1, 2, 3):
        check_equal({(0, kind): two[stage, kind] for kind in KINDS}, {(0, kind): one[0, kind] for kind in KINDS})


def gradients(config, kind):
    """Gradients of the loss of the global batch, averaged over the ranks as DeepSpeed does, without an optimizer."""
    model = towers(config)
    batch = own_rows(global_batch(kind, config["vision_cfg"]["image_size"]))
    image_BD, text_BD, scale = model(batch.images, batch.tokens)
    loss = clip_loss(image_BD, text_BD, image_BD, text_BD, scale, batch.valid)
    loss.backward()
    grads = {}
    for name, parameter in model.named_parameters():
        if comm.world() > 1:
            torch.distributed.all_reduce(parameter.grad)
        grads[name] = parameter.grad / comm.world()
    return comm.mean(loss), grads


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet with batch norm"])
def test_gradients_of_ranks_average_to_those_of_the_whole_batch(config):
    ((loss1, one),) = run_ranks(gradients, 1, config, "clip")
    for loss, many in run_ranks(gradients, 2, config, "clip"):
        assert loss == pytest.approx(loss1, rel=1e-5)
        for name in one:
            # A bias of batch norm sums over all pixels: by the processor float32 was off by 1.7e-5 of the largest.
            atol = 5e-5 * one[name].abs().max().item() + 1e-7
            torch.testing.assert_close(many[name], one[name], rtol=1e-4, atol=atol, msg=name)


def test_on_gpus_batch_norm_with_an_activation_remains_the_same_model(monkeypatch):
    """In evaluation, where torch's SyncBatchNorm needs no GPU."""
    vision = {"image_size": 160, "timm_model_name": "test_efficientnet", "timm_pool": "avg", "timm_proj": "linear"}
    clip, images = towers({**RESNET, "vision_cfg": vision}).clip.eval(), torch.randn(2, 3, 160, 160)
    before = clip.encode_image(images)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    clip = share_batch_norm(clip)
    kinds = {type(child) for child in clip.modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)}
    assert all(issubclass(kind, nn.SyncBatchNorm) for kind in kinds) and SyncBatchNormAct in kinds
    assert torch.equal(clip.encode_image(images), before)


def test_bf16_trains_at_every_stage():
    for losses, weights in run_ranks(train, 2, [0, 1, 2, 3], "bf16")[0].values():
        assert all(0 < loss < 10 for loss in losses) and all(torch.isfinite(w).all() for w in weights.values())


def own_weights():
    """This rank's weights after steps in bf16 at ZeRO 0, where each rank keeps all of them."""
    settings = Train(batch_size=ROWS, lr=1e-2, zero_stage=0, precision="bf16", clip=1.0)
    engine = engines.start_engine(towers(VIT), settings, comm.device())
    for step in range(STEPS):
        train_step(engine, {}, own_rows(global_batch("clip", 16, step)), "clip")
    return {name: p.detach().float() for name, p in engine.module.named_parameters()}


def test_ranks_keep_the_same_weights_in_bf16():
    """They read different rows: each would go its own way if gradients were not averaged."""
    one, two = run_ranks(own_weights, 2)
    assert all(torch.equal(value, two[name]) for name, value in one.items())


class Formats(TorchDispatchMode):
    """Number formats that collectives add in."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, operation, _types, args=(), kwargs=None):
        if operation.namespace == "c10d" and "reduce" in str(operation):
            self.found |= {x.dtype for x in tree_leaves(args) if torch.is_tensor(x)}
        return operation(*args, **(kwargs or {}))


def formats(stage):
    """Number formats in which gradients are added over the ranks."""
    settings = Train(batch_size=ROWS, zero_stage=stage, precision="bf16")
    engine = engines.start_engine(towers(VIT), settings, comm.device())
    batch = own_rows(global_batch("clip", 16))
    image_BD, text_BD, scale = engine(batch.images, batch.tokens)
    loss = clip_loss(image_BD, text_BD, image_BD, text_BD, scale, batch.valid)
    with Formats() as formats:
        engine.backward(loss)
    return formats.found


def formats_all():
    return [formats(stage) for stage in (0, 1, 2, 3)]


def test_gradients_of_bf16_are_added_in_fp32_at_every_stage():
    for found in run_ranks(formats_all, 2)[0]:
        assert found == {torch.float32}


def places(stage, precision):
    """{name: (bytes from its storage's start, numbers)} of a residual network's weights under the engine."""
    engine = engines.start_engine(
        towers(RESNET), Train(batch_size=ROWS, zero_stage=stage, precision=precision), comm.device()
    )
    return {name: (p.storage_offset() * p.element_size(), p.numel()) for name, p in engine.module.named_parameters()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_stand_where_gpu_kernels_read_16_bytes_at_once(precision):
    for stage in (1, 2):
        (place,) = run_ranks(places, 1, stage, precision)
        assert len({offset for offset, _ in place.values()}) > len(place) / 2  # they do lie end to end
        assert all(offset % 16 == 0 for offset, numbers in place.values() if numbers % 8 == 0), stage


def clamp(stage, start, precision):
    """(logit scale, its weight, other weights that changed) after steps that push nothing (rate 0), from weights whose
    scale starts out of bounds."""
    model = towers(VIT)
    model.clip.logit_scale.data.fill_(start)
    settings = Train(batch_size=ROWS, zero_stage=stage, precision=precision)
    engine = engines.start_engine(model, settings, comm.device())
    engines.set_lr(engine, 0.0)
    before = engines.consolidated_state(engine)
    for _ in range(2):  # the second step starts from the clamped master
        scale = train_step(engine, {}, own_rows(global_batch("clip", 16)), "clip")[1]
    after = engines.consolidated_state(engine)
    weight = after.get("logit_scale", torch.tensor(float("nan")))
    changed = [name for name in after if name != "logit_scale" and not torch.equal(before[name], after[name])]
    return float(scale), float(weight), changed


def clamp_all():
    cases = itertools.product((0, 1, 2, 3), (9.0, -3.0), ("fp32", "bf16"))
    return {case: clamp(*case) for case in cases}


def test_the_logit_scale_stays_in_bounds_at_every_stage():
    main, other = run_ranks(clamp_all, 2)
    for case, (used, weight, changed) in main.items():
        _, start, precision = case
        bounded, off = MAX_LOG_SCALE if start > 0 else 0.0, 1e-6 if precision == "fp32" else 2e-2
        assert used == other[case][0] == pytest.approx(math.exp(bounded), rel=max(off, 1e-5)), case
        assert weight == pytest.approx(bounded, abs=off), case
        assert not changed, case


def skipped(stage):
    """(whether each of two steps was taken, CLIP before and after the first); in that one the last rank's pictures
    become no numbers. Gradients are clipped."""
    settings, batch = Train(batch_size=ROWS, zero_stage=stage, clip=1.0), own_rows(global_batch("clip", 32))
    engine = engines.start_engine(towers(RESNET), settings, comm.device())
    before = engines.consolidated_state(engine)
    last = comm.rank() == comm.world() - 1
    hook = engine.module.clip.visual.register_forward_pre_hook(
        lambda module, inputs: (inputs[0] * float("nan"),) if last else None
    )
    first = train_step(engine, {}, batch, "clip")[2]
    after = engines.consolidated_state(engine)
    hook.remove()
    return (first, train_step(engine, {}, batch, "clip")[2]), before, after


def skipped_all():
    return [skipped(stage) for stage in (0, 1, 3)]


def test_a_step_without_numbers_leaves_batch_norms_statistics_too():
    for taken, before, after in run_ranks(skipped_all, 2)[0]:
        assert taken == (False, True) and any("running_var" in name for name in before)
        for name, value in before.items():
            assert "num_batches" in name or torch.equal(after[name], value), name


def patience_of_groups(stage):
    engines.start_engine(towers(VIT), Train(batch_size=ROWS, zero_stage=stage), comm.device())
    backends = [group._get_backend(comm.device()) for group in torch.distributed.distributed_c10d._world.pg_map]
    return [backend.options._timeout for backend in backends]


def test_every_group_waits_for_a_rank_that_works_alone():
    """DeepSpeed's own group too, which it makes with the default timeout."""
    (own, deepspeed), _ = run_ranks(patience_of_groups, 2, 3)
    assert own == deepspeed == comm.PATIENCE


def compiler_after_start(stage):
    engines.start_engine(towers(VIT), Train(batch_size=ROWS, zero_stage=stage), comm.device())
    return "torch._inductor.compile_fx" in sys.modules, os.environ.get("TORCHDYNAMO_DISABLE")


def test_a_start_imports_no_compiler_and_leaves_it_on():
    assert run_ranks(compiler_after_start, 1, 2) == [(False, None)]


def save_and_load(folder, stage):
    settings = Train(batch_size=ROWS, lr=1e-2, zero_stage=stage)
    batch = own_rows(global_batch("clip", 16))
    engine = engines.start_engine(towers(VIT), settings, comm.device())
    train_step(engine, {}, batch, "clip")
    for path, data in engines.serialise(engine, f"{folder}/{stage}/deepspeed").items():
        write_bytes(path, data)
    comm.barrier()
    train_step(engine, {}, batch, "clip")
    again = engines.start_engine(towers(VIT), settings, comm.device())
    engines.load(again, f"{folder}/{stage}/deepspeed")
    train_step(again, {}, batch, "clip")
    return engines.consolidated_state(engine), engines.consolidated_state(again)


def save_and_load_all(folder):
    return {stage: save_and_load(folder, stage) for stage in (0, 1, 2, 3)}


def test_what_is_saved_resumes_bit_for_bit_at_every_stage(tmp_path):
    for stage, (whole, resumed) in run_ranks(save_and_load_all, 2, str(tmp_path))[0].items():
        assert whole and all(torch.equal(whole[name], resumed[name]) for name in whole), stage


def load_with_other_settings(folder, stage):
    """[(betas, eps, weight decay)] of the optimizer's groups, of an engine that loads one of other settings."""
    saved = engines.start_engine(towers(VIT), Train(batch_size=ROWS, zero_stage=stage), comm.device())
    for path, data in engines.serialise(saved, f"{folder}/{stage}/deepspeed").items():
        write_bytes(path, data)
    settings = Train(batch_size=ROWS, zero_stage=stage, beta1=0.5, beta2=0.8, eps=1e-3, weight_decay=0.7)
    engine = engines.start_engine(towers(VIT), settings, comm.device())
    engines.load(engine, f"{folder}/{stage}/deepspeed")
    return [(group["betas"], group["eps"], group["weight_decay"]) for group in engine.optimizer.param_groups]


def load_all_with_other_settings(folder):
    return [load_with_other_settings(folder, stage) for stage in (0, 1, 3)]


def test_a_loaded_optimizer_has_the_settings_of_the_config(tmp_path):
    """With run.accept_changes they may be others than those of the checkpoint."""
    (found,) = run_ranks(load_all_with_other_settings, 1, str(tmp_path))
    assert found == [[((0.5, 0.8), 1e-3, 0.7), ((0.5, 0.8), 1e-3, 0.0)]] * 3
