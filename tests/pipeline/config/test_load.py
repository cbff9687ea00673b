"""Configuration: layers, types, and errors that name the key."""

from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline.config.load import load_config
from pipeline.config.renamed import RENAMED
from pipeline.config.schema import PRESETS
from shards.errors import UserError

BASE = "data: {index: here, streams: 2}\nmodel: {name: RN50}\ntrain: {batch_size: 8}\n"


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def test_yaml_lies_over_the_preset_and_the_command_line_over_both(file):
    path = file(BASE + "preset: default\nselection: {growth: 0.02}\n")
    config = load_config(path, ["selection.max_fraction=0.7", "train.lr=1e-3"])
    assert (config.selection.first_fraction, config.selection.growth, config.selection.max_fraction) == (
        0.99,
        0.02,
        0.7,
    )
    assert config.train.lr == 1e-3


def test_a_file_can_have_its_own_settings_for_a_preset(file):
    path = file(BASE + "presets: {clip: {train: {lr: 0.5}}}\n")
    assert load_config(path, ["preset=clip"]).train.lr == 0.5
    assert load_config(path, ["preset=paper"]).train.lr == 5e-4


@pytest.mark.parametrize("name", ["cc3m_rn50", "cc12m_vitb32", "laion400m_vitb16"])
def test_the_configs_of_large_sets_leave_a_preset_whole(name):
    config = load_config(Path(__file__).parents[3] / "configs" / f"{name}.yaml", ["preset=default"])
    assert PRESETS["default"]["selection"].items() <= asdict(config.selection).items()
    assert config.train.unimodal_epochs == PRESETS["default"]["train"]["unimodal_epochs"]


@pytest.mark.parametrize(
    "override, names",
    [
        ("train.epoch=3", "train.epochs"),
        ("train.epochs=many", "train.epochs"),
        ("train.epochs=0", "train.epochs"),
        ("train.precision=fp8", "train.precision"),
        ("train.zero_stage=4", "train.zero_stage"),
        ("selection.first_fraction=1.5", "selection.first_fraction"),
        ("selection.refill=1", "selection.refill"),
        ("preset=best", "preset"),
        ("train=3", "train"),
        ("data.streams=3", "data.streams"),
        ("data.index=", "data.index"),
        ("data.sources={a: {index: x}}", "either data.index or data.sources"),
        ("data.cache_gb=0", "data.cache_gb"),
        ("data.remote_timeout=-1", "data.remote_timeout"),
        ("model.config={embed_dim: 3}", "model.name"),
        ("train.epochs", "a.b=value"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_key(file, override, names):
    with pytest.raises(UserError, match=names) as error:
        load_config(file(BASE), [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("old, new", RENAMED.items())
def test_a_former_key_is_refused_with_its_new_name(file, old, new):
    with pytest.raises(UserError, match=f"{old}: unknown; did you mean {new}"):
        load_config(file(BASE), [f"{old}=0.5"])


@pytest.mark.parametrize("weight", ["1.5", "0", "-1", "true", "'2'", "null"])
def test_a_weight_is_a_whole_number(file, weight):
    sources = f"data.sources={{cc: {{index: x}}, laion: {{index: y, weight: {weight}}}}}"
    with pytest.raises(UserError, match="data.sources.laion.weight: got .*, expected a whole number"):
        load_config(file(BASE), ['data.index=""', sources])


@pytest.mark.parametrize("source", ["x", "{weight: 2}", "{index: x, weights: 2}"])
def test_a_source_is_an_index_and_a_weight(file, source):
    with pytest.raises(UserError, match="data.sources.cc: got"):
        load_config(file(BASE), ['data.index=""', f"data.sources={{cc: {source}}}"])


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "\xff"])
def test_a_file_that_is_no_config_is_refused(file, text):
    with pytest.raises(UserError, match="config"):
        load_config(file(text))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_the_hash_changes_with_what_is_learnt_and_with_nothing_else(file):
    path = file(BASE)
    same = load_config(path).hash()
    assert load_config(path, ["run.dir=x", "data.workers=7", "wandb.mode=offline"]).hash() == same
    assert load_config(path, ["data.cache=/x", "data.remote_timeout=1", "data.allow_pipe=true"]).hash() == same
    assert load_config(path, ["run.seed=1"]).hash() != same
    sources = [
        load_config(path, ['data.index=""', f"data.sources={{a: {{index: {i}, weight: {w}}}}}"])
        for i, w in ("x1", "y1", "x2")
    ]
    assert sources[0].hash() == sources[1].hash() != sources[2].hash()
    assert load_config(path, ["data.clip_augment.flip=0.1"]).hash() != same


@pytest.mark.parametrize(
    "name", ["quickstart", "emoji", "shapes_small", "cc3m_rn50", "cc12m_vitb32", "laion400m_vitb16"]
)
@pytest.mark.parametrize("preset", ["clip", "paper", "default"])
def test_the_shipped_recipes_load(name, preset):
    root = Path(__file__).parents[3]
    config = load_config(root / "configs" / f"{name}.yaml", [f"preset={preset}"])
    assert config.train.method == ("clip" if preset == "clip" else "safeclip")
