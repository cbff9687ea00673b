"""A real SLURM of two nodes. launch/slurm.sbatch: whatever takes its nodes away, the job ends with the weights of one
left alone. Data: tasks of srun and of an array make what one process makes."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipeline.training import checkpoint
from shards.build.shapes import shapes
from tests.helpers.runs import config, safeclip

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "tests" / "slurm" / "cluster.sh"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
MISSING = [name for name in PROGRAMS if not shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin")]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"no SLURM here ({', '.join(MISSING)} not found); apt-get install slurm-wlm munge"
)
UNFINISHED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "PREEMPTED")


class Job:
    """A job in the cluster of `folder`: `words` for sbatch."""

    def __init__(self, folder, *words):
        self.folder = folder
        self.number = self.slurm("sbatch", "--parsable", *words).strip()

    def slurm(self, *words):
        """What a command of SLURM prints."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        env |= {"SLURM_CONF": f"{self.folder}/cluster/slurm.conf", "OMP_NUM_THREADS": "1"}
        env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # as in the shell of somebody who debugs one rank
        return subprocess.run(words, cwd=ROOT, env=env, check=True, capture_output=True, text=True, timeout=60).stdout

    def facts(self):
        """What scontrol knows: JobState, Restarts, ExitCode ..."""
        words = self.slurm("scontrol", "show", "job", self.number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def states(self):
        """States of all tasks of an array, or of the job."""
        words = self.slurm("scontrol", "show", "job", self.number).split()
        return {word.split("=", 1)[1] for word in words if word.startswith("JobState=")}

    def minutes(self):
        """Full minutes that it has run."""
        days, _, clock = self.facts()["RunTime"].rpartition("-")
        hours, minutes, _ = map(int, clock.split(":"))
        return (int(days or 0) * 24 + hours) * 60 + minutes

    def limit(self, minutes):
        self.slurm("scontrol", "update", f"JobId={self.number}", f"TimeLimit={minutes}")

    def end(self):
        """(state, exit code, restarts) when it is over."""
        wait(lambda: self.facts()["JobState"] not in UNFINISHED, self)
        facts = self.facts()
        return facts["JobState"], int(facts["ExitCode"].split(":")[0]), int(facts["Restarts"])


class Training(Job):
    """The real batch file with a small run in folder/name."""

    def __init__(self, folder, name, *options, override=()):
        self.run, self.log = folder / name, folder / f"{name}.log"
        # The file asks for GPUs, which the test's nodes do not have.
        shape = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", f"--output={self.log}")
        batch = (str(ROOT / "launch" / "slurm.sbatch"), f"{folder}/config.yaml", f"run.dir={self.run}")
        super().__init__(folder, *shape, *options, *batch, *override)

    def said(self):
        return self.log.read_text() if self.log.exists() else ""

    def wait_for_step(self, step):
        """Until a checkpoint of that step or a later one is complete."""

        def there():
            newest, _ = checkpoint.newest_complete(self.run)
            return newest and int(newest.name[-8:]) >= step

        wait(there, self)

    def ranks(self):
        """Process ids of the two ranks: srun and the batch file have the same words, but are not python."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (place / "cmdline").read_bytes().split(b"\0")
                if f"run.dir={self.run}".encode() in words and words[0].endswith(b"python"):
                    found.append(int(place.name))
        return found

    def weights(self):
        """(step, bytes of model.safetensors) of the finished run."""
        newest, warnings = checkpoint.newest_complete(self.run)
        assert "done, " in self.said() and not warnings
        return newest.name, (newest / "model.safetensors").read_bytes()


def wait(happened, job):
    limit = time.monotonic() + 300
    while not happened():
        if time.monotonic() > limit:
            raise AssertionError(f"job {job.number}: {job.facts()}\n{job.said() if isinstance(job, Training) else ''}")
        time.sleep(0.1)


def warned(rank):
    """Whether SIGUSR1 waits for a stopped process (one that is gone was warned too)."""
    try:
        lines = Path(f"/proc/{rank}/status").read_text().splitlines()
    except OSError:
        return True
    (pending,) = [line.split()[1] for line in lines if line.startswith("ShdPnd:")]
    return bool(int(pending, 16) >> (signal.SIGUSR1 - 1) & 1)


def send(ranks, number):
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, number)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The folder of a cluster."""
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run(["bash", CLUSTER, "start", folder / "cluster"], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["bash", CLUSTER, "stop", folder / "cluster"], check=True)


@pytest.fixture(scope="module")
def whole(cluster):
    """A job that is left alone, with data and a config."""
    shapes(cluster / "shapes", pairs=240, test=36)
    values = config(cluster, "", train__epochs=6, run__save_steps=5).model_dump()
    (cluster / "config.yaml").write_text(yaml.safe_dump(values))
    return Training(cluster, "whole")


SRUN, ARRAY, BATCH = ("--nodes=2", "--ntasks-per-node=1"), ("--array=3-5:2",), ("--ntasks=2",)


@pytest.mark.parametrize("options, before", [(SRUN, "srun "), (ARRAY, ""), (BATCH, "")])
def test_shards_are_indexed_by_srun_by_an_array_and_in_a_batch_script(cluster, make_shards, tmp_path, options, before):
    make_shards([3, 0, 2, 4, 1])
    shards = f"{tmp_path}/tars/**/*.tar"
    said = safeclip("index", shards, "--out", tmp_path / "one").stdout
    command = f"{before}{sys.executable} -m pipeline.cli index '{shards}' --out {tmp_path}/many"
    job = Job(cluster, *options, f"--output={tmp_path}/log.%t%a", f"--wrap={command}")
    wait(lambda: job.states().isdisjoint(UNFINISHED), job)
    assert job.states() == {"COMPLETED"}
    printed = "".join(path.read_text() for path in tmp_path.glob("log.*"))
    assert printed.count(said.replace("/one", "/many")) == 1
    assert files(tmp_path / "one") == files(tmp_path / "many")


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_job_that_nears_its_time_limit_saves_and_goes_back_into_the_queue(whole):
    """The ranks are held before the limit is set to the next full minute, and until the warning came, so that a fast
    host does not finish earlier. (SLURM may continue what it warns.)"""
    job = Training(whole.folder, "limited", "--signal=USR1@1")
    job.wait_for_step(5)
    ranks = job.ranks()
    send(ranks, signal.SIGSTOP)
    assert ranks and "done, " not in job.said()
    job.limit(job.minutes() + 1)
    wait(lambda: all(map(warned, ranks)), job)
    send(ranks, signal.SIGCONT)
    wait(lambda: int(job.facts()["Restarts"]) >= 1, job)
    job.limit(30)  # one that is completing cannot be changed: only now
    state, code, restarts = job.end()
    assert (state, code) == ("COMPLETED", 0) and restarts >= 1
    said = job.said()
    assert "asked to stop; saved" in said and "resumes after step" in said
    assert f"slurm.sbatch: job {job.number} was asked to stop (code 75) and goes back into the queue" in said
    assert whole.end() == ("COMPLETED", 0, 0)
    assert job.weights() == whole.weights()


def test_a_job_resumes_that_was_preempted_then_requeued_and_then_lost_a_process(whole):
    assert whole.end() == ("COMPLETED", 0, 0)  # it would be pre-empted too
    job = Training(whole.folder, "requeued")
    job.wait_for_step(10)
    urgent = Job(whole.folder, "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    assert urgent.end() == ("COMPLETED", 0, 0)
    wait(lambda: "resumes after step" in job.said(), job)
    assert "asked to stop; saved" in job.said() and "goes back into the queue" in job.said()
    job.slurm("scontrol", "requeue", job.number)
    job.wait_for_step(35)
    send(job.ranks()[:1], signal.SIGKILL)
    assert job.end() == ("FAILED", 128 + signal.SIGKILL, 2)  # by itself it is put back only when it was asked to stop
    job.slurm("scontrol", "requeue", job.number)
    assert job.end() == ("COMPLETED", 0, 3)
    assert job.said().count("resumes after step") == 3
    assert job.weights() == whole.weights()


def test_a_mistake_ends_the_job_with_2_and_one_line_and_does_not_put_it_back(whole):
    job = Training(whole.folder, "mistake", override=["train.batch_size=25"])
    assert job.end() == ("FAILED", 2, 0)
    assert job.said().count("safeclip: data.streams: got 4") == 1


def test_a_cancelled_job_is_not_put_back(whole):
    job = Training(whole.folder, "cancelled")
    job.wait_for_step(5)
    job.slurm("scancel", job.number)
    state, _, restarts = job.end()
    assert (state, restarts) == ("CANCELLED", 0)
