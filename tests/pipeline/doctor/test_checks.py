"""safeclip doctor finds, before a run, what would end it; and its estimates are what a run then takes."""

import os
import shutil
import socket
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml

from pipeline.cli.main import main
from pipeline.config.schema import Data
from pipeline.distributed import comm
from pipeline.doctor import checks as doctor
from pipeline.doctor import footprint
from pipeline.doctor.samples import try_samples
from pipeline.doctor.shards import check_bad_samples
from pipeline.training import checkpoint
from pipeline.training import run as running
from shards.build.shapes import shapes
from shards.index.build_index import build_index
from shards.index.shard_index import ShardIndex
from shards.samples.samples import Samples
from tests.helpers.models import MODEL
from tests.helpers.pictures import picture
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import config, safeclip
from tests.helpers.servers import flaky
from tests.helpers.tars import write_tar


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, a finished run of one process, and the first epoch of one in bf16 and of two at each ZeRO stage."""
    made = tmp_path_factory.mktemp("doctor")
    shapes(made / "shapes", pairs=240, test=36)
    for world in (1, 2):
        run_ranks(train_each, world, made)
    return made


# Processes and config of each run.
KINDS = {"one": (1, {}), "bf16": (1, {"train__precision": "bf16"})}
KINDS |= {f"stage{stage}": (2, {"train__zero_stage": stage}) for stage in range(4)}


def train_each(folder):
    for name, (world, changes) in KINDS.items():
        if world == comm.world():
            if name != "one":
                changes = {**changes, "train__epochs": 1, "train__low_rate_epochs": 0}
            running.train(config(folder, name, **changes))


@pytest.fixture
def world(folder, tmp_path):
    """A copy that a test may break; its data have an index of their own."""
    shutil.copytree(folder / "one", tmp_path / "run")
    shutil.copytree(folder / "shapes", tmp_path / "shapes", ignore=shutil.ignore_patterns("index"))
    build_index([str(path) for path in sorted(tmp_path.glob("shapes/train/*.tar"))], tmp_path / "shapes" / "index")
    return tmp_path


@pytest.fixture(autouse=True)
def alone(monkeypatch, folder):
    """This process as the only rank, whatever it was before."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def fatal(made, **words):
    """The fatal findings, one text."""
    found = doctor.examine(made, **words)
    return "; ".join(f"{about}: {text}" for level, about, text in found if level == "fatal")


def test_a_run_that_can_start_or_resume_is_sound_and_nothing_is_written(world):
    before = sorted(world.rglob("*"))
    for name in ("run", "new"):
        assert fatal(config(world, name)) == ""
    assert sorted(world.rglob("*")) == before


def test_a_run_that_never_selects_is_told(world):
    made = config(world, "new")
    found = [text for level, _, text in doctor.examine(made) if level == "warning"]
    assert not any("no selection round" in text for text in found)
    made.train.epochs = made.train.unimodal_epochs + made.train.low_rate_epochs
    found = [text for level, _, text in doctor.examine(made) if level == "warning"]
    assert any("no selection round, so all pairs are trained on" in text for text in found)


def test_what_evaluation_names_is_tried(world):
    made = config(world, "new", evaluation__evaluators=["loss"])
    assert "evaluation: evaluation.evaluators: loss needs held-out pairs" in fatal(made)
    held_out = write_tar(world / "held_out.tar", [("0.png", picture(0)), ("0.txt", b"a red star")])
    build_index([str(held_out)], world / "held_out", workers=1)
    made.evaluation.pairs = str(world / "held_out")
    found = [text for level, about, text in doctor.examine(made) if (level, about) == ("ok", "evaluation")]
    assert found == ["loss after every epoch, on 1 of 1 held-out pairs"]
    held_out.write_bytes(bytes(held_out.stat().st_size))
    assert f"{held_out}: holds other bytes than were indexed" in fatal(made)


def test_two_processes_try_the_network_and_agree(world):
    first, second = run_ranks(doctor.examine, 2, config(world, "run"))
    assert first == second
    assert any(about == "network" and "2 processes on 1 host" in text for _, about, text in first)
    assert any("saved by 1 processes and now with 2" in text for _, _, text in first)


def on_hosts(hosts_R):
    """What `everywhere` finds, each rank of the host in hosts_R seeing a single GPU."""
    os.environ["LOCAL_RANK"] = "0"
    socket.gethostname = lambda: hosts_R[comm.rank()]
    return doctor.everywhere(lambda: [("ok", "memory", f"as rank {comm.rank()} sees it")])


def test_only_the_first_process_of_a_host_checks_it():
    on_a, on_b = ("ok", "memory", "on a: as rank 0 sees it"), ("ok", "memory", "on b: as rank 1 sees it")
    assert run_ranks(on_hosts, 3, ["a", "b", "a"]) == [[on_a, on_b]] * 3


def test_a_missing_shard_is_fatal(world):
    shard = Path(ShardIndex.load(world / "shapes" / "index").shards[0].path)
    shard.unlink()
    assert f"data: shard {shard}: missing" in fatal(config(world, "run"))


def test_another_shard_of_the_same_size_is_found(world):
    shard = Path(ShardIndex.load(world / "shapes" / "index").shards[0].path)
    data, time = bytearray(shard.read_bytes()), shard.stat().st_mtime_ns
    data[-1] ^= 1  # padding behind the archive's end
    shard.write_bytes(data)
    assert f"{shard}: holds other bytes than were indexed" in fatal(config(world, "run"))
    os.utime(shard, ns=(time, time))
    assert fatal(config(world, "run")) == ""
    assert "do not hold what was indexed" in fatal(config(world, "run"), content=True)
    shard.write_bytes(bytes(len(data)))
    os.utime(shard, ns=(time, time))
    assert f"{shard}: the picture of sample" in fatal(config(world, "run"))


def test_a_batch_that_the_processes_do_not_divide_is_fatal(world):
    assert "7 processes do not divide" in fatal(config(world, "run"), ranks=7)


def test_state_that_does_not_fit_is_fatal_and_what_is_passed_over_is_a_warning(world):
    assert "train.lr: 0.0005 -> 0.1" in fatal(config(world, "run", train__lr=0.1))
    newest = checkpoint.checkpoints(world / "run")[-1]
    (newest / checkpoint.MARKER).unlink()
    found = doctor.examine(config(world, "run"))
    assert [level for level, _, text in found if newest.name in text] == ["warning"]


def test_a_mask_that_is_gone_in_mid_epoch_is_fatal(world):
    newest = checkpoint.checkpoints(world / "run")[-1]
    state = (newest / "state.json").read_text()
    (newest / "state.json").write_text(
        state.replace('"epoch": 4', '"epoch": 3').replace('"epoch_step": 0', '"epoch_step": 5')
    )
    size = (newest / "state.json").stat().st_size
    marker = newest / checkpoint.MARKER
    marker.write_text(marker.read_text().replace(f'"state.json": {len(state)}', f'"state.json": {size}'))
    assert fatal(config(world, "run")) == ""
    (world / "run" / "masks" / "epoch_003" / "mask.json").unlink()
    assert "epoch_003/mask.json is missing" in fatal(config(world, "run"))


def test_the_disk_must_hold_a_checkpoint_beside_the_last(world, monkeypatch):
    made, usage = config(world, "run"), namedtuple("usage", "total used free")
    index, size = ShardIndex.load(made.data.index), footprint.measure(made)
    one = footprint.checkpoint_bytes(made, size, 1)
    for free, expected in ((1.9 * one, "fatal"), (2.1 * one, "warning"), (100 * one, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free))
        assert footprint.check_disk(made, index, size, 1)[0][0] == expected


def test_a_model_that_no_rank_can_hold_is_fatal(world):
    made = config(world, "run")
    index, size = ShardIndex.load(made.data.index), {"parameters": 10**12, "trained": 10**12, "embed_dim": 512}
    (level, _, text), *_ = footprint.check_memory(made, index, size, 1)
    assert level == "fatal" and "train.zero_stage" in text
    made.train.zero_stage = 3
    assert footprint.check_memory(made, index, size, 100_000)[0][0] == "fatal"  # one process began it, at stage 0
    made.run.dir = None
    assert footprint.check_memory(made, index, size, 100_000)[0][0] == "ok"


def test_a_temporary_folder_that_cannot_hold_the_scores_is_fatal(world, monkeypatch):
    made, usage = config(world, "run"), namedtuple("usage", "total used free")
    index, size = ShardIndex.load(made.data.index), footprint.measure(made)
    guards = {"duplicates": {}, "trigger_clusters": {}}
    for made.guards, needed in (({}, 240 * 4.125), (guards, 240 * (4.125 + 2 / 8))):
        for free, expected in ((needed - 1, "fatal"), (needed, "ok")):
            monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free))
            level, _, text = footprint.check_memory(made, index, size, 1)[1]
            assert level == expected and "one copy a host" in text


def test_a_sample_that_no_rank_can_hold_is_fatal(world, monkeypatch):
    made = config(world, "run")
    made.guards = {"trigger_clusters": {"sample": 100}}
    index = ShardIndex.load(made.data.index)
    for memory, expected in ((460_000, "fatal"), (480_000, "ok")):
        monkeypatch.setattr(footprint, "host_memory", lambda: memory)
        level, _, text = footprint.check_host(made, index)[-1]
        assert level == expected and "sample of trigger_clusters takes 422 kB" in text


@pytest.mark.parametrize("name", KINDS)
def test_a_checkpoint_is_as_large_as_was_said(folder, name):
    world, changes = KINDS[name]
    made = config(folder, name, **changes)
    newest = checkpoint.newest_complete(folder / name)[0]
    said = footprint.checkpoint_bytes(made, footprint.measure(made), world)
    found = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    assert said == pytest.approx(found, rel=0.05)


def test_what_the_index_counted_is_compared_with_what_the_run_allows(tmp_path):
    members = []
    for i in range(40):
        members += [(f"{i:02d}.png", picture(i))] if i != 20 else []
        members += [(f"{i:02d}.txt", b"a red star" if i != 7 else b"")] if i != 20 else [("20.json", b"{}")]
    build_index([str(write_tar(tmp_path / "a.tar", members))], tmp_path / "index")
    index, data = ShardIndex.load(tmp_path / "index"), Data()
    ((level, about, text),) = check_bad_samples(data, index)
    assert (level, about) == ("fatal", "data") and "2 samples, 5.00% of an epoch, cannot be used" in text
    assert "1 x empty caption" in text and text.endswith("or set data.max_bad_fraction=0.06")
    data.max_bad_fraction = 0.06
    assert check_bad_samples(data, index)[0][0] == "ok"
    data.max_bad_fraction, data.mask = 0.01, "mask"  # which may leave them out
    assert check_bad_samples(data, index)[0][0] == "warning"
    assert try_samples(Samples(index), "data") == []  # the middle one is known to be bad


def test_the_command_tells_by_its_exit_code(world, monkeypatch, capfd):
    made = {"data": {"index": "shapes/index"}, "model": {"config": MODEL}, "train": {"batch_size": 48}}
    (world / "config.yaml").write_text(yaml.safe_dump(made))
    done = safeclip("doctor", "config.yaml", "run.dir=new", "--ranks", "2", cwd=world)
    assert "ok      memory: about" in done.stdout and not (world / "new").exists()
    monkeypatch.chdir(world)
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", "config.yaml", "run.dir=new", "--ranks", "5"])
    said = capfd.readouterr()
    assert "fatal   config: train.batch_size" in said.out and not said.err


def test_shards_behind_urls_are_tried_without_fetching_them(world):
    with flaky(world) as (address, log):
        there = f"{address}/shapes/train/{{00000..00000}}.tar"
        build_index([there], world / "remote", workers=1)
        made = config(world, "run")
        made.data.index, made.data.cache, made.data.remote_timeout = str(world / "remote"), str(world / "cache"), 5.0
        log.clear()
        found = doctor.examine(made)
        assert all(level == "ok" for level, about, _ in found if about == "data")
        assert any("1 shards of" in text and "lie behind URLs" in text for *_, text in found)
        assert not list((world / "cache").glob("*.tar"))
        made.data.cache_gb = 1e-6
        assert any(level == "warning" and "raise data.cache_gb" in text for level, _, text in doctor.examine(made))
        shard = world / "shapes" / "train" / "00000.tar"
        shard.write_bytes(shard.read_bytes()[:-512])
        assert "were indexed" in fatal(made)
        shard.unlink()
        assert "00000.tar: missing" in fatal(made)
