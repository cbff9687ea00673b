"""Configuration: layers, types, and errors that name the key."""

import functools
import math
import operator
import re
import tempfile
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import pipeline.attacks  # noqa: F401  its sections too
from pipeline.cli.main import main
from pipeline.config import load
from pipeline.config.load import load_config, make_config, read_yaml, to_yaml
from pipeline.config.presets import PRESETS
from pipeline.config.renamed import RENAMED
from pipeline.config.schema import Config
from pipeline.guards import REGISTRY
from pipeline.settings import Section, keys
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
    """Over those of all presets in the file, under those of the command line."""
    path = file(
        BASE.replace("batch_size: 8", "batch_size: 8, lr: 0.25, epochs: 7") + "presets: {clip: {train: {lr: 0.5}}}\n"
    )
    assert load_config(path, ["preset=clip"]).train.lr == 0.5
    assert load_config(path, ["preset=paper"]).train.lr == 0.25
    assert load_config(path, ["preset=clip", "train.lr=1"]).train.lr == 1
    assert load_config(path, ["preset=clip", "presets.clip.train.lr=2"]).train.lr == 2
    assert load_config(path, ["preset=clip"]).train.epochs == 7


@pytest.mark.parametrize("name", ["cc3m_rn50", "cc12m_vitb32", "laion400m_vitb16"])
def test_the_configs_of_large_sets_leave_a_preset_whole(name):
    config = load_config(Path(__file__).parents[3] / "configs" / f"{name}.yaml", ["preset=default"])
    assert PRESETS["default"]["selection"].items() <= config.selection.model_dump().items()
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
        ("model.lock_image=true", "model.lock_image: freezes random weights"),
        ("model.mean=[0.5]", "model.mean"),
        ("model.std=[1, 0, 1]", "model.std"),
        ("train.epochs", "a.b=value"),
        ("train.lr=[", "train.lr"),
        ("preset=[]", "preset"),
        ("presets={clip: 3}", "presets"),
        ("train={1: 2}", "train.1: unknown"),
        ("data.sources={1: {index: x}}", "data.sources.1"),
        ("model.config={embed_dim: .nan}", "model.config.embed_dim"),
        ("data.clip_augment.hue=0.6", "data.clip_augment.hue: got 0.6, expected a number >= 0 and <= 0.5"),
        ("data.clip_augment.hues=0", "did you mean data.clip_augment.hue?"),
        ("data.clip_augment.crop_min=0", "data.clip_augment.crop_min"),
        ("data.limits.max_pixels=0", "data.limits.max_pixels"),
        ("data.workers=-1", "data.workers"),
        ("data.cache_gb=-1", "data.cache_gb"),
        ("run.seed=-1", "run.seed"),
        ("run.save_steps=-3", "run.save_steps"),
        ("run.timeout=-1", "run.timeout"),
        ("run.timeout=0", "run.timeout"),
        ("run.timeout=.inf", "run.timeout: got inf, expected a finite number >= 1 and <= 1000000000"),
        ("train.lr=nan", "train.lr"),
        ("train.lr=.nan", "train.lr: got nan, expected a finite number >= 0 and <= 100"),
        ("train.lr=-0.1", "train.lr"),
        ("train.lr=1e309", "train.lr"),
        ("train.beta2=1", "train.beta2"),
        ("train.eps=-1e-9", "train.eps"),
        ("train.warmup_steps=-5", "train.warmup_steps"),
        ("train.clip=-1", "train.clip"),
        ("train.weight_decay=-5", "train.weight_decay"),
        ('train.epochs="3"', "train.epochs"),
        ("train.epochs=1.5", "train.epochs"),
        ("train.epochs=true", "train.epochs"),
        ("guards.duplicates={}", "guards: got duplicates, but they need pictures as they are"),
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
    with pytest.raises(UserError, match="data.sources.laion.weight: got .*, expected a whole number > 0 and <= "):
        load_config(file(BASE), ['data.index=""', sources])


@pytest.mark.parametrize(
    "source, text",
    [
        ("x", "data.sources.cc: got 'x', expected a mapping of index, weight"),
        ("{weight: 2}", "data.sources.cc.index: missing"),
        ("{index: x, weights: 2}", "did you mean data.sources.cc.weight?"),
    ],
)
def test_a_source_is_an_index_and_a_weight(file, source, text):
    with pytest.raises(UserError) as error:
        load_config(file(BASE), ['data.index=""', f"data.sources={{cc: {source}}}"])
    assert text in str(error.value)


def test_a_number_has_an_exponent_without_a_point_and_may_be_whole(file):
    config = load_config(file(BASE + "selection: {growth: 1}\n"), ["train.lr=5e-4", "data.clip_augment.hue=1E-1"])
    assert (config.train.lr, config.data.clip_augment.hue, config.selection.growth) == (5e-4, 0.1, 1.0)
    assert type(config.selection.growth) is float


KEYS = {key.name: key for key in keys(Config)}
KEYS |= {key.name: key for name, guard in REGISTRY.items() for key in keys(guard.Settings, f"guards.{name}.")}
SECTIONS = {name.rpartition(".")[0] for name in KEYS} - {""}
TEXT = st.text(st.characters(exclude_characters="$~", exclude_categories=["Cs"]))  # what paths expand is tested below
ODD = st.sampled_from([math.nan, math.inf, -1, "x", [], {}, None, True, 10**400])


@settings(max_examples=1_000)
@given(
    st.sampled_from(sorted({*KEYS, *SECTIONS})), ODD | st.floats() | st.integers() | TEXT | st.lists(ODD, max_size=2)
)
def test_any_value_is_within_bounds_or_refused_by_name(name, value):
    values = value
    for part in reversed(name.split(".")):
        values = {part: values}
    try:
        config = make_config(values)
    except UserError as error:
        assert str(error).startswith(f"{name}: got ") and "\n" not in str(error)
        return
    if value is not None and value != {}:
        found = functools.reduce(operator.getitem, name.split("."), config.model_dump())
        assert found == type(found)(value)  # a float of a whole number
        for sign, bound in re.findall(r"(>=|>|<=|<) ([^\s)]+)", KEYS[name].allowed):
            assert eval(f"{found} {sign} {bound}")


def beyond(allowed):
    """Values that a key's `allowed` excludes: beyond each bound, infinite, and of other types."""
    found = [{"a": 1}, [1]]
    if "number" in allowed:
        found += [math.nan, math.inf, -math.inf, 10**400, -(10**400), "1", True]
    for sign, bound in re.findall(r"(>=|>|<=|<) ([^\s)]+)", allowed):
        step = 0 if sign in "<>" else 1 if "whole" in allowed else 1e-3 * max(1.0, abs(float(bound)))
        found.append(float(bound) - step if sign[0] == ">" else float(bound) + step)
        if "whole" in allowed:
            found[-1] = int(found[-1])
    return found


@pytest.mark.parametrize("name", sorted(KEYS))
def test_a_value_out_of_range_is_one_line_that_names_the_key(name):
    for value in beyond(KEYS[name].allowed):
        if KEYS[name].allowed.startswith("a mapping") and isinstance(value, dict):
            continue
        values = value
        for part in reversed(name.split(".")):
            values = {part: values}
        with pytest.raises(UserError, match=f"^{name}: ") as error:
            make_config(values)
        assert "\n" not in str(error.value) and "expected" in str(error.value)


def sections(kind=Section):
    return {kind}.union(*map(sections, kind.__subclasses__()))


SECTIONS = sorted(sections(), key=lambda kind: (kind.__module__, kind.__qualname__))


@pytest.mark.parametrize("kind", SECTIONS, ids=lambda kind: kind.__qualname__)
def test_every_number_has_both_bounds(kind):
    for key in keys(kind) if kind.model_fields else ():
        if "number" in key.allowed:
            assert re.search(">=? ", key.allowed) and re.search("<=? ", key.allowed), key


PATHS = ["run.dir", "data.index", "data.sources", "data.cache", "data.overlay", "data.mask", "model.pretrained"]
PATHS += ["evaluation.pairs", "evaluation.test", "evaluation.index", "evaluation.labels"]


@pytest.mark.parametrize("name", PATHS)
def test_home_and_variables_are_replaced_in_a_path_once(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/a")
    monkeypatch.setenv("DATA", "/data/5$DATA")

    def made(path):
        values = {"a": {"index": path}} if name == "data.sources" else path
        for part in reversed(name.split(".")):
            values = {part: values}
        return make_config(values).model_dump()

    saved = made("~/$DATA")  # as a run directory keeps it
    assert "/home/a//data/5$$DATA" in str(saved)
    assert make_config(saved).model_dump() == saved
    with pytest.raises(UserError, match=f"^{name}.*: got '/x/.UNSET', but .UNSET is not set"):
        made("/x/$UNSET")


def test_the_presets_have_one_list_of_names():
    assert set(PRESETS) == set(get_args(Config.model_fields["preset"].annotation))


def test_every_key_is_described():
    assert all(key.about.endswith(".") for key in KEYS.values())


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "\xff"])
def test_a_file_that_is_no_config_is_refused(file, text):
    with pytest.raises(UserError, match="config"):
        load_config(file(text))


@pytest.mark.parametrize(
    "text, names",
    [
        ("wandb: {project: a}\nwandb: {name: b}\n", "wandb stands twice in one mapping.*line "),
        ("wandb: {name: a, name: b}\n", "name stands twice"),
        ("presets: {defualt: {train: {lr: 0.5}}}\n", "presets.defualt: unknown.*known here: paper, .*default"),
    ],
)
def test_no_setting_of_a_file_is_lost_unsaid(file, text, names):
    with pytest.raises(UserError, match=names):
        load_config(file(BASE + text))


def test_an_anchor_may_be_merged_and_overridden(file):
    path = file(BASE + "wandb: &one {name: a, project: b}\npresets: {clip: {wandb: {<<: *one, name: c}}}\n")
    config = load_config(path, ["preset=clip"])
    assert (config.wandb.name, config.wandb.project) == ("c", "b")


def test_a_word_sets_one_of_two_keys_that_share_a_mapping(file):
    text = BASE.replace("{index: here,", "{clip_augment: &a {blur: 0.5}, unimodal_augment: *a, index: here,")
    assert text != BASE
    data = load_config(file(text), ["data.clip_augment.blur=0.125"]).data
    assert (data.clip_augment.blur, data.unimodal_augment.blur) == (0.125, 0.5)


def test_tensorboard_that_is_not_installed_is_refused(file, monkeypatch):
    monkeypatch.setattr(load, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="tensorboard.enabled: .*pip install tensorboard"):
        load_config(file(BASE), ["tensorboard.enabled=true"])


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_the_hash_changes_with_what_is_learnt_and_with_nothing_else(file):
    path = file(BASE)
    same = load_config(path).hash()
    assert load_config(path, ["run.dir=x", "data.workers=7", "wandb.mode=offline"]).hash() == same
    assert load_config(path, ["tensorboard.enabled=true", "train.profile=1"]).hash() == same
    assert load_config(path, ["data.cache=/x", "data.remote_timeout=1", "data.allow_pipe=true"]).hash() == same
    assert load_config(path, ["run.seed=1"]).hash() != same
    given = ["model.pretrained=x"]
    assert load_config(path, given).hash() != load_config(path, [*given, "model.lock_text=true"]).hash()
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


@pytest.mark.parametrize("source", ["default", str(Path(__file__).parents[3] / "configs" / "quickstart.yaml")])
def test_the_command_config_prints_every_key_and_its_value(source, capsys):
    main(["config", source, "train.lr=0.125", "preset=default", "guards.duplicates=null"])
    lines = capsys.readouterr().out.splitlines()
    shown = dict(line.split(": ", 1) for line in lines if not line.startswith(" "))
    assert shown.keys() == KEYS.keys() - {"guards"}
    assert (shown["train.lr"], shown["selection.risky"], shown["data.cache"]) == ("0.125", "skip", "null")
    assert (shown["guards.duplicates.max_pairs"], shown["guards.trigger_clusters.least"]) == ("off", "8")


@settings(max_examples=300)
@example("12345678e901")  # as a hash of 12 hex digits may be
@example("1e5")
@given(st.text(alphabet="0123456789abcdefx.+-_:", max_size=12))
def test_a_string_is_read_as_it_was_written_also_where_it_looks_like_a_number(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_bytes(to_yaml({"hash": text, "model": {"pretrained": text}}))
        assert read_yaml(path) == {"hash": text, "model": {"pretrained": text}}
