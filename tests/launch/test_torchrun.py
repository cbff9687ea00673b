"""launch/torchrun.sh as people use it: two nodes, a process that is killed, a signal that asks it to stop."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from pipeline.training import checkpoint
from shards.build.shapes import shapes
from tests.helpers.runs import config

ROOT = Path(__file__).parents[2]
EPOCHS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, a config, and a run of two processes that was left alone."""
    made = tmp_path_factory.mktemp("launch")
    shapes(made / "shapes", pairs=240, test=36)
    values = config(made, "", train__epochs=EPOCHS, run__save_steps=5, run__timeout=60.0).model_dump()
    (made / "config.yaml").write_text(yaml.safe_dump(values))
    assert end(launch(made, "whole", PROCESSES=2)) == 0
    return made


def launch(folder, name, *words, **env):
    words = ["bash", str(ROOT / "launch" / "torchrun.sh"), f"{folder}/config.yaml", f"run.dir={folder}/{name}", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **{key: str(value) for key, value in env.items()}}
    log = open(folder / f"{name}.log", "ab")
    return subprocess.Popen(words, env=env, stdout=log, stderr=log)


def end(process):
    return process.wait(timeout=300)


def wait_for_step(folder, name, step):
    """Until a checkpoint of that step or a later one is complete."""
    limit = time.monotonic() + 300
    while time.monotonic() < limit:
        newest, _ = checkpoint.newest_complete(folder / name)
        if newest and int(newest.name[-8:]) >= step:
            return
        time.sleep(0.02)
    raise AssertionError((folder / f"{name}.log").read_text())


def weights(folder, name):
    """(step, bytes of model.safetensors) of the finished run."""
    newest, warnings = checkpoint.newest_complete(folder / name)
    assert not warnings and checkpoint.load_state(newest)["epoch"] == EPOCHS
    return newest.name, (newest / "model.safetensors").read_bytes()


def trainers(folder, name):
    """Process ids of the ranks of a run."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"run.dir={folder}/{name}".encode() in words and not any(b"torch" in word for word in words):
            found.append(int(place.name))
    return found


def wait_for_listeners(folder, name, ranks):
    """Until the ranks' processes catch SIGTERM, which is long before they have read their config."""
    limit = time.monotonic() + 300
    while time.monotonic() < limit:
        caught = [Path(f"/proc/{process}/status").read_text() for process in trainers(folder, name)]
        caught = [int(text.split("SigCgt:")[1].split()[0], 16) for text in caught]
        if sum(mask >> (signal.SIGTERM - 1) & 1 for mask in caught) == ranks:
            return
        time.sleep(0.005)
    raise AssertionError((folder / f"{name}.log").read_text())


def test_two_nodes_start_again_by_themselves_when_a_process_is_killed(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [launch(folder, "killed", NODES=2, PROCESSES=1, MASTER_PORT=port, RESTARTS=1) for _ in range(2)]
    wait_for_step(folder, "killed", 10)
    ranks = trainers(folder, "killed")
    assert len(ranks) == 2
    os.kill(ranks[0], signal.SIGKILL)
    assert [end(node) for node in nodes] == [0, 0]
    assert "resumes after step" in (folder / "killed.log").read_text()
    assert weights(folder, "killed") == weights(folder, "whole")


def test_a_signal_to_the_script_saves_and_the_same_command_resumes(folder):
    for number, at in ((signal.SIGTERM, None), (signal.SIGUSR1, 10)):
        script = launch(folder, "stopped", PROCESSES=2)
        if at is None:  # while it still imports
            wait_for_listeners(folder, "stopped", 2)
        else:
            wait_for_step(folder, "stopped", at)
        script.send_signal(number)
        assert end(script) == 75
        assert not trainers(folder, "stopped")
    said = (folder / "stopped.log").read_text()
    assert said.count("asked to stop before it began") == said.count("asked to stop; saved") == 1
    assert "Traceback" not in said
    assert end(launch(folder, "stopped", PROCESSES=2)) == 0
    assert weights(folder, "stopped") == weights(folder, "whole")


@pytest.mark.parametrize("words, found", [("train.lr=-1", "train.lr: got -1"), ("data.index=nowhere", "nowhere")])
def test_a_mistake_of_the_user_is_said_once_and_not_tried_again(folder, words, found):
    """The first is found by each rank by itself, before they know each other, the second by rank 0."""
    name = words.partition("=")[0]
    assert end(launch(folder, name, words, PROCESSES=2)) == 2
    said = (folder / f"{name}.log").read_text()
    assert said.count("safeclip:") == 1 and found in said and "Traceback" not in said


@pytest.mark.parametrize(
    "smi, visible, found",
    [
        (8, None, "8"),
        (8, "0,3", "2"),
        (8, "5", "1"),
        (8, "", "0"),
        (2, "0,1,2,3", "2"),
        (0, None, "0"),
        (0, "0,1", "0"),
    ],
)
def test_processes_are_as_many_as_the_gpus_that_they_will_see(tmp_path, smi, visible, found):
    """smi: how many nvidia-smi lists, each with an instance of MIG below it."""
    lines = "".join(f"echo 'GPU {number}: NVIDIA H100'; echo '  MIG 1g.10gb'\n" for number in range(smi))
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/bash\n{lines}exit {0 if smi else 9}\n")
    program.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    env.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        env["CUDA_VISIBLE_DEVICES"] = visible
    words = ["bash", "-euo", "pipefail", "-c", '. "$0"; gpus=$(gpus); echo "$gpus"', str(ROOT / "launch" / "gpus.sh")]
    assert subprocess.run(words, env=env, check=True, capture_output=True, text=True).stdout.strip() == found
