"""Every family of open_clip's models: built, used in every step, normalised by its own statistics, exported, and begun
from given weights; and those that are refused."""

import copy
import importlib.util
import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.config.schema import Config
from pipeline.doctor.model import check_model
from pipeline.training.export import export_run
from pipeline.training.model import (
    build_model,
    open_clip_config,
    param_groups,
    picture_size,
    pixel_stats,
    tokenizer_for,
)
from pipeline.training.pretrained import make_towers
from shards.errors import UserError
from shards.views.augment import plain_view
from tests.helpers.hugging_face import make_folder, model_of
from tests.helpers.models import FAMILIES, MODEL, SIGMOID, VIT

TEXTS = ["a photo of a red dog.", "cat"]
needs_transformers = pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers")


@pytest.fixture(params=[*FAMILIES, pytest.param("hugging face", marks=needs_transformers)])
def family(request, tmp_path):
    return FAMILIES.get(request.param) or model_of(make_folder(tmp_path / "tower"))


def model_keys(config, **more):
    return {**Config().model.model_dump(), "config": copy.deepcopy(config), **more}


def moved(towers):
    """The towers with weights that no start has."""
    with torch.no_grad():
        for p in towers.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return towers


def save_run(folder, config, towers):
    """A run directory with a complete checkpoint, as far as an export and a start read it."""
    checkpoint = folder / "checkpoints" / "step_00000000"
    checkpoint.mkdir(parents=True)
    save_file(towers.clip.state_dict(), checkpoint / "model.safetensors")
    (checkpoint / "COMPLETE").write_text('{"files": {}}')
    made = Config()
    made.model.config, made.run.dir = copy.deepcopy(config), str(folder)
    return made


def check_export(made, towers, out):
    """The export, loaded by open_clip alone, has the towers' features, logit scale and logit bias."""
    export_run(made.run.dir, made, out)
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    size, keys = picture_size(made.model.model_dump()), made.model.model_dump()
    pixels = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    images = torch.stack([preprocess(Image.fromarray(one)) for one in pixels])
    tokens = open_clip.get_tokenizer(f"local-dir:{out}")(TEXTS)
    assert torch.equal(tokens, tokenizer_for(keys)(TEXTS))
    ours = torch.stack([torch.tensor(plain_view(one, size)).permute(2, 0, 1) for one in pixels])
    with torch.no_grad():
        image, text, scale = towers.eval()(ours, tokens)
        clip.eval()
        torch.testing.assert_close(clip.encode_image(images, normalize=True), image, rtol=0, atol=1e-5)
        torch.testing.assert_close(clip.encode_text(tokens, normalize=True), text, rtol=0, atol=1e-5)
        found = [clip.logit_scale.exp()] + ([] if clip.logit_bias is None else [clip.logit_bias])
        torch.testing.assert_close(torch.stack(found), scale)


def test_a_family_uses_all_its_weights_and_open_clip_loads_its_export(family, tmp_path):
    torch.manual_seed(0)
    towers = moved(make_towers(model_keys(family)))
    size, length = picture_size({"config": family}), tokenizer_for({"config": family})([""]).shape[1]
    tokens = torch.randint(1, 10, (2, length))
    image, text, scale = towers(torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8), tokens)
    (image.sum() + text.sum() + scale.sum()).backward()
    assert image.shape == text.shape == (2, family["embed_dim"])
    assert all(p.grad is not None for p in towers.parameters())
    assert all(p.ndim for p in towers.parameters())  # DeepSpeed stores none of 0 dimensions
    check_export(save_run(tmp_path / "run", family, towers), towers, tmp_path / "out")


def test_doctor_describes_a_family_and_names_what_is_wrong_with_a_model(tmp_path):
    made = Config()
    made.model.config = copy.deepcopy(FAMILIES["siglip"])
    ((level, _, text),) = check_model(made)
    assert level == "ok" and "CustomTextCLIP" in text and "sigmoid" in text and "160 px" in text
    for change, wanted in (
        ({"vision_cfg": {**FAMILIES["siglip"]["vision_cfg"], "image_size": 96}}, "does not take pictures of 96 px"),
        ({"embed_dim": 32}, "embeddings of 96 and 32 numbers"),
        ({"text_cfg": {**FAMILIES["siglip"]["text_cfg"], "vocab_size": 500}}, "vocab_size is 500"),
        ({"multimodal_cfg": {}}, "CoCa"),
    ):
        made.model.config = {**copy.deepcopy(FAMILIES["siglip"]), **change}
        ((level, _, text),) = check_model(made)
        assert level == "fatal" and wanted in text
    made.model.config, made.model.pretrained = MODEL, str(tmp_path / "none.safetensors")
    ((level, _, text),) = check_model(made)
    assert level == "fatal" and "none.safetensors" in text


def test_doctor_finds_weights_that_no_step_uses(monkeypatch):
    made = Config()
    made.model.config = copy.deepcopy(FAMILIES["convnext"])
    towers = make_towers(made.model.model_dump())
    towers.clip.spare = torch.nn.Linear(2, 2)
    monkeypatch.setattr("pipeline.doctor.model.make_towers", lambda model: towers.to("meta"))
    for stage, wanted in ((1, "warning"), (3, "fatal")):
        made.train.zero_stage = stage
        assert [(level, "spare.weight" in text) for level, _, text in check_model(made)] == [
            ("ok", False),
            (wanted, True),
        ]


@pytest.mark.parametrize(
    "model, words",
    [
        ({"name": "coca_ViT-B-32"}, "coca_ViT-B-32 is a CoCa"),
        ({"config": {**MODEL, "text_cfg": {**MODEL["text_cfg"], "output_tokens": True}}}, "model.config is a CoCa"),
        ({"name": "ViT-B-16-SigLIP2-NaFlex"}, "NaFlex"),
        ({"config": {**MODEL, "vision_cfg": {"timm_model_name": "naflexvit_base_patch16_gap"}}}, "NaFlex"),
        ({"config": {**MODEL, "cast_dtype": None}}, "cast_dtype is no key"),
        ({"name": "hf-hub:timm/x"}, "open_clip knows no"),
    ],
)
def test_a_model_without_two_towers_is_refused_by_name(model, words):
    with pytest.raises(UserError, match=words):
        build_model(model)


def test_pixels_are_normalised_as_in_the_family():
    half, openai = ([0.5] * 3, [0.5] * 3), (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    for model, wanted in (
        ({"name": "RN50"}, openai),
        ({"name": "ViT-L-14"}, openai),  # its published weights have several
        ({"name": "ViT-S-32-alt"}, openai),  # it has none
        ({"name": "ViT-B-16-SigLIP2"}, half),
        ({"config": SIGMOID}, half),
        ({"config": VIT}, openai),
        ({"config": VIT, "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 0.5]}, ([0.1, 0.2, 0.3], [1.0, 1.0, 0.5])),
    ):
        assert [list(one) for one in pixel_stats(model)] == [list(one) for one in wanted], model


def test_siglip_starts_at_its_own_scale_and_bias():
    clip = build_model({"config": SIGMOID})
    assert clip.logit_scale.exp().item() == pytest.approx(10) and clip.logit_bias.tolist() == [-10]
    assert build_model({"config": {**SIGMOID, "init_logit_scale": 1.0}}).logit_scale.item() == 1


@needs_transformers
def test_a_tokenizer_of_a_local_folder_has_the_context_length_of_the_config(tmp_path):
    folder = make_folder(tmp_path / "tower")
    for length in (4, 9, 30):
        tokens = tokenizer_for({"config": model_of(folder, length)})(["A red dog", "word", "a " * 50])
        assert tokens.shape == (3, length) and tokens[1].tolist() == [2, 1, 3] + [0] * (length - 3)
        assert tokens[2, -1] == 3 and tokens[0, :4].tolist() == ([2, 4, 7, 8] if length > 4 else [2, 4, 7, 3])
    made = Config()
    made.model.config = model_of(folder, 40)
    ((level, _, text),) = check_model(made)
    assert level == "fatal" and "reads 32 tokens" in text


def local_directory(folder, config, towers, **preprocess):
    folder.mkdir()
    save_file(
        {name: value.clone() for name, value in towers.clip.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return str(folder)


def same(one, two, tower=None):
    mine, other = one.clip.state_dict(), two.clip.state_dict()
    names = [
        n for n in mine if not tower or n.startswith("visual.") == (tower == "image") and not n.startswith("logit")
    ]
    return all(torch.equal(mine[name], other[name]) for name in names)


def test_a_run_begins_with_the_weights_of_every_form(tmp_path):
    given = moved(make_towers(model_keys(SIGMOID)))
    stats = {"mean": [0.5] * 3, "std": [0.5] * 3}
    state = given.clip.state_dict()
    scalars = {name: value.reshape(()) if name.startswith("logit") else value for name, value in state.items()}
    plain = {name.removeprefix("text."): value for name, value in state.items()}
    torch.save(
        {"epoch": 3, "state_dict": {f"module._orig_mod.{n}": v for n, v in scalars.items()}}, tmp_path / "epoch_3.pt"
    )
    save_file(plain, tmp_path / "plain.safetensors")
    save_run(tmp_path / "run", SIGMOID, given)
    local = local_directory(tmp_path / "local", SIGMOID, given, **stats)
    for source in (tmp_path / "epoch_3.pt", tmp_path / "plain.safetensors", tmp_path / "run", local):
        assert same(make_towers(model_keys(SIGMOID, pretrained=str(source))), given), source
    torch.save({"model": open_clip.CLIP}, tmp_path / "code.pt")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "plain.safetensors").read_bytes()[:99])
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.bin")
    bad = [("code.pt", "cannot be read"), ("cut.safetensors", "cannot be read"), ("other.bin", "has neither tower")]
    (tmp_path / "some.txt").touch()
    bad += [("none.pt", "no such file"), ("some.txt", "ends in '.txt'")]
    for name, words in bad:
        with pytest.raises(UserError, match=words) as error:
            make_towers(model_keys(SIGMOID, pretrained=str(tmp_path / name)))
        assert "\n" not in str(error.value)


def test_weights_of_another_architecture_or_other_pixels_are_refused(tmp_path):
    given = make_towers(model_keys(SIGMOID))
    local = local_directory(tmp_path / "local", {**SIGMOID, "quick_gelu": True}, given, mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.raises(UserError, match="its quick_gelu is True, this model's is False"):
        make_towers(model_keys(SIGMOID, pretrained=local))
    local = local_directory(tmp_path / "pixels", SIGMOID, given, mean=[0.4, 0.5, 0.6], std=[0.5] * 3)
    with pytest.raises(UserError, match=r"model.mean=\[0.4, 0.5, 0.6\] model.std=\[0.5, 0.5, 0.5\]"):
        make_towers(model_keys(SIGMOID, pretrained=local))
    make_towers(model_keys(SIGMOID, pretrained=local, mean=[0.4, 0.5, 0.6], std=[0.5] * 3))
    for content in (
        "{",
        "[]",
        '{"model_cfg": 3}',
        '{"model_cfg": {"embed_dim": 1, "vision_cfg": {"no": 1}, "text_cfg": {}}}',
    ):
        (tmp_path / "pixels" / "open_clip_config.json").write_text(content)
        with pytest.raises(UserError, match="open_clip_config.json cannot be read"):
            make_towers(model_keys(SIGMOID, pretrained=local))


def test_weights_of_one_tower_leave_the_other_for_lit(tmp_path):
    """LiT: a trained picture tower that is frozen, and a text tower from random weights."""
    given = moved(make_towers(model_keys(SIGMOID)))
    for tower in ("image", "text"):
        part = {n: v for n, v in given.clip.state_dict().items() if n.startswith("visual.") == (tower == "image")}
        save_file({n: v for n, v in part.items() if not n.startswith("logit")}, tmp_path / f"{tower}.safetensors")
    torch.manual_seed(5)
    fresh = make_towers(model_keys(SIGMOID))
    torch.manual_seed(5)
    lit = make_towers(model_keys(SIGMOID, pretrained=str(tmp_path / "image.safetensors"), lock_image=True))
    assert same(lit, given, "image") and same(lit, fresh, "text")
    with pytest.raises(UserError, match="has no image tower, which model.lock_image freezes"):
        make_towers(model_keys(SIGMOID, pretrained=str(tmp_path / "text.safetensors"), lock_image=True))
    frozen = {name for name, p in lit.clip.named_parameters() if not p.requires_grad}
    assert frozen == {name for name in lit.clip.state_dict() if name.startswith("visual.")}
    trained = {id(p) for group in param_groups(lit, 0.1) for p in group["params"]}
    assert trained == {id(p) for p in lit.parameters() if p.requires_grad}
    with pytest.raises(UserError, match="no weight of the towers is trained"):
        lit.lock(True, True)


def test_the_config_of_every_architecture_that_open_clip_knows_is_taken():
    for name in open_clip.list_models():
        if not name.startswith("coca"):
            config, stats = open_clip_config({"name": name}), pixel_stats({"name": name})
            assert config["embed_dim"] and picture_size({"name": name}) >= 224 and [len(one) for one in stats] == [3, 3]
