"""Checkpointed, compiled and patch-dropped towers train and score what the plain ones do, under the same names."""

import copy
import gc
import sys

import pytest
import torch

from pipeline.config.learnt import differences
from pipeline.config.load import make_config, to_yaml
from pipeline.config.schema import Config, Train
from pipeline.distributed import comm
from pipeline.training import engine as engines
from pipeline.training import levers
from pipeline.training.garbage import EVERY, collected_at_fixed_steps
from pipeline.training.levers import apply_levers, check_compiler, checkpoint_activations, compile_towers, drop_patches
from pipeline.training.precision import tf32, with_precision
from pipeline.training.run_dir import check_config
from pipeline.training.step import step_loss, train_step
from shards.errors import UserError
from shards.storage.files import write_bytes
from tests.helpers.models import RESNET, VIT
from tests.helpers.ranks import run_ranks
from tests.helpers.steps import ROWS, global_batch, own_rows, towers

TIMM = {**VIT, "vision_cfg": {"image_size": 32, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"}}
LEAN = {**VIT, "vision_cfg": VIT["vision_cfg"] | {"layers": 1}, "text_cfg": VIT["text_cfg"] | {"layers": 1}}
OPENAI_RESNET = {**VIT, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}}


def trained(change, stage, clip=0.0):
    """(weights after a step, embeddings then in eval mode, gradient norm) with `change` made to the CLIP."""
    model = towers(LEAN)
    names = list(model.state_dict())
    change(model.clip)
    assert list(model.state_dict()) == names
    settings = Train(batch_size=ROWS, lr=1e-3, eps=1e-2, zero_stage=stage, clip=clip)
    engine = engines.start_engine(model, settings, comm.device())
    images, tokens, _ = whole = global_batch("clip", 16)
    assert train_step(engine, {}, own_rows(whole), "clip")[2]
    engine.eval()
    with torch.no_grad():
        embedded = engine(images[0], tokens[0])[:2]
    return engines.consolidated_state(engine), embedded, float(engine.gradient_norm)


def plain(_clip):
    pass


def compiled(clip):
    compile_towers(clip, 0, backend="aot_eager")


def results():
    clips = dict.fromkeys([(plain, 0), (compiled, 0), (checkpoint_activations, 0), (plain, 1), (compiled, 1)], 10.0)
    clips |= dict.fromkeys([(plain, 3), (checkpoint_activations, 3)], 0.0)
    return {(change.__name__, stage): trained(change, stage, clip) for (change, stage), clip in clips.items()}


@pytest.fixture(scope="module")
def found():
    return run_ranks(results, 2)[0]


@pytest.mark.parametrize(
    "stage, change", [(0, "compiled"), (0, "checkpoint_activations"), (1, "compiled"), (3, "checkpoint_activations")]
)
def test_two_ranks_train_and_score_what_plain_towers_do(found, change, stage):
    weights, embedded, _ = found[change, stage]
    wanted, others, _ = found["plain", stage]
    assert list(weights) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6, msg=name)
    for one, other in zip(embedded, others):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def norm_of_whole_batch():
    """The norm of the gradient of one rank with the whole batch, by torch's own function."""
    model = towers(LEAN)
    batch = own_rows(global_batch("clip", 16))
    step_loss("clip", *model(batch.images, batch.tokens), {}, batch.valid).backward()
    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))


def test_the_gradient_norm_is_that_of_the_whole_batch_before_clipping(found):
    (wanted,) = run_ranks(norm_of_whole_batch, 1)
    assert wanted > 20  # at stages 0 and 1 it is clipped at 10
    for (name, stage), (_, _, norm) in found.items():
        assert norm == pytest.approx(wanted, rel=1e-4), (name, stage)


@pytest.mark.parametrize("config", [VIT, TIMM], ids=["open_clip", "timm"])
def test_patches_are_dropped_in_training_only(config):
    model, images = towers(config), global_batch("clip", config["vision_cfg"]["image_size"])[0][0]
    names, seen = list(model.state_dict()), []
    whole = model.eval()(images, None)[0]
    drop_patches(model.clip.visual, 0.5)
    visual = model.clip.visual
    blocks = visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks
    blocks[0].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].shape[1]))
    assert torch.equal(model.eval()(images, None)[0], whole)
    first, second = model.train()(images, None)[0], model(images, None)[0]
    full, dropped, again = seen
    assert (full, dropped, again) == (5, 3, 3)  # a class token and 4 patches, half of them
    assert not torch.equal(first, second) and list(model.state_dict()) == names


def test_what_a_model_cannot_do_is_refused_by_name():
    for config in (RESNET, OPENAI_RESNET):
        with pytest.raises(UserError, match="model.patch_dropout: got 0.5, but the image tower is a .*ResNet"):
            drop_patches(towers(config).clip.visual, 0.5)
        with pytest.raises(UserError, match="train.checkpoint_activations: the image tower is a .*ResNet"):
            checkpoint_activations(towers(config).clip)
    with pytest.raises(UserError, match="train.compile: .* train.zero_stage 3"):
        compile_towers(towers(VIT).clip, 3)
    with pytest.raises(UserError, match="train.precision: got bf16, but the model has batch norm"):
        apply_levers(towers(RESNET), Config(train={"precision": "bf16"}))
    apply_levers(towers(VIT), Config(train={"precision": "bf16"}))


def test_a_compiler_that_is_lacking_is_named_before_the_run_begins(monkeypatch):
    monkeypatch.setenv("CXX", sys.executable)
    check_compiler(torch.device("cpu"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="train.compile: no-such-compiler was not found"):
        check_compiler(torch.device("cpu"))
    monkeypatch.setattr(levers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="train.compile: Triton was not found"):
        check_compiler(torch.device("cuda"))


def test_levers_are_off_by_default_and_change_no_hash_of_a_run():
    for preset in ("paper", "default", "clip", "roclip"):
        config, model = make_config({"preset": preset}), towers(VIT)
        before = copy.deepcopy(model)
        apply_levers(model, config)
        assert repr(model) == repr(before) and not any(m.__dict__.get("_compiled_call_impl") for m in model.modules())
        assert "model.patch_dropout" not in [key for key, *_ in differences({}, config.model_dump())]
        other = make_config(
            {"preset": preset, "train": {"accumulate": 4, "compile": True, "checkpoint_activations": True}}
        )
        assert other.hash() == config.hash()
        assert make_config({"preset": preset, "model": {"patch_dropout": 0.5}}).hash() != config.hash()


@pytest.mark.parametrize("able, word", [(True, "bf16"), (False, "fp32")])
def test_auto_is_bf16_where_the_gpu_has_it(monkeypatch, able, word):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
    for preset, wanted in {
        "default": word,
        "clip": word,
        "paper": "fp32",
        "roclip": "fp32",
        "cleanclip": "fp32",
    }.items():
        config = make_config({"preset": preset})
        assert with_precision(config).train.precision == wanted, preset
    assert make_config({"preset": "default"}).train.precision == "auto"


def test_auto_is_fp32_on_the_cpu_with_the_hash_of_fp32():
    config = make_config({"preset": "default"})
    assert with_precision(config).hash() == make_config({"preset": "default", "train": {"precision": "fp32"}}).hash()


def test_a_run_does_not_resume_at_another_precision(tmp_path):
    """Where it is known; "auto" is resolved by a start, and not by `safeclip doctor`, which may be called elsewhere."""
    begun = make_config({"preset": "default", "train": {"precision": "bf16"}})
    write_bytes(tmp_path / "config.yaml", to_yaml({"hash": begun.hash(), **begun.model_dump()}))
    auto = make_config({"preset": "default"})
    check_config(auto, tmp_path)
    with pytest.raises(UserError, match="train.precision: 'bf16' -> 'fp32'"):
        check_config(with_precision(auto), tmp_path)
    other = make_config({"preset": "default", "train": {"lr": 0.5}})
    with pytest.raises(UserError, match=r"another config \(train.lr: 0.0005 -> 0.5\)"):
        check_config(other, tmp_path)


def test_tf32_is_on_in_a_step_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), tf32():
        assert torch.backends.cuda.matmul.allow_tf32 and torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
        raise KeyError
    assert torch.get_float32_matmul_precision() == before == "highest" and not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32  # of convolutions, where torch's default is True


def test_garbage_is_collected_at_fixed_steps_and_as_before_afterwards(monkeypatch):
    collected, collect = [], gc.collect
    monkeypatch.setattr(gc, "collect", lambda: collected.append(done) or collect())
    done = -1
    for done in collected_at_fixed_steps(range(2 * EVERY + 1)):
        assert not gc.isenabled()
    assert collected == [-1, EVERY - 1, 2 * EVERY - 1] and gc.isenabled()
    frozen = gc.get_freeze_count()
    later = [[] for _ in range(1000)]
    with pytest.raises(KeyError):
        for done in collected_at_fixed_steps(range(3)):
            raise KeyError
    assert gc.isenabled() and 0 < gc.get_freeze_count() <= frozen and later
