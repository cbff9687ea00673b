"""Commands that are asked to stop keep what they have done, and the same words do the rest."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from pipeline.audit import findings
from pipeline.audit import score as scoring
from pipeline.audit.detectors import REGISTRY
from pipeline.cli.main import main
from tests.helpers.audits import make_model, make_pairs
from tests.helpers.ranks import run_ranks


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stop")
    return make_model(folder / "model"), make_pairs(folder / "data", [f"thing {i}" for i in range(60)])


def ask_after(calls, function, done):
    """`function`, after so many calls of which this process is sent SIGTERM; `done` counts them."""

    def asked(*arguments):
        found = function(*arguments)
        done.append(arguments)
        if len(done) == calls:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    return asked


def ended(words):
    """Exit code of a command; 0 if it returns."""
    try:
        main(words)
    except SystemExit as end:
        return end.code
    return 0


def score_in_two(words):
    done, write_shard = [], scoring.write_shard
    scoring.write_shard = ask_after(2, write_shard, done)
    code = ended(words)
    again = []
    scoring.write_shard = ask_after(0, write_shard, again)
    return code, [shard for _, shard, *_ in done], ended(words), [shard for _, shard, *_ in again]


def test_scores_that_were_stopped_go_on_after_the_shards_that_are_done(pairs, tmp_path):
    model, paths = pairs
    words = ["score", "--model", model, "--data", *paths, "--workers", "0", "--out", str(tmp_path / "scores")]
    assert run_ranks(score_in_two, 1, words) == [(75, [0, 1], 0, [2])]


def audit_in_two(words, out):
    """(exit codes, names of the detectors that ran) of an audit that is stopped and given again; then of one that is
    not."""
    found, classes = [], dict(REGISTRY)

    def named(name):
        class Counted(classes[name]):
            def find(self, *arguments):
                ran.append(name)
                if name == stopped:
                    os.kill(os.getpid(), signal.SIGUSR1)
                return super().find(*arguments)

        return Counted

    findings.REGISTRY.update({name: named(name) for name in classes})
    for stopped, folder in (("repeated_caption", "cut"), (None, "cut"), (None, "whole")):
        ran = []
        found.append((ended([*words, "--out", f"{out}/{folder}"]), ran))
    return found


def test_an_audit_that_was_stopped_finds_the_same(pairs, tmp_path):
    model, paths = pairs
    main(["score", "--model", model, "--data", *paths, "--workers", "0", "--out", str(tmp_path / "scores")])
    ((cut, rest, whole),) = run_ranks(audit_in_two, 1, ["audit", str(tmp_path / "scores")], str(tmp_path))
    assert (cut[0], rest[0], whole[0]) == (75, 0, 0)
    assert len(cut[1]) > 1 and cut[1][:-1] + rest[1] == whole[1]
    for name in ("findings.parquet", "findings.csv", "report.html"):
        one, other = (
            re.sub(rb'"seconds": ?[0-9.]+', b"", (tmp_path / run / name).read_bytes()) for run in ("cut", "whole")
        )
        assert one == other, name
    assert not (tmp_path / "cut/unfinished").exists()


def test_an_index_that_was_stopped_reads_the_rest_only(pairs, tmp_path):
    """The third shard never comes; its process is not waited for."""
    out, paths = tmp_path / "index", pairs[1]
    words = [sys.executable, "-m", "pipeline.cli", "index", "--allow-pipe", "--workers", "2", "--out", str(out)]
    stopped = subprocess.Popen([*words, *paths[:2], "pipe:exec sleep 60"], stderr=subprocess.PIPE, text=True)
    while len(list(out.glob("tables/*.parquet"))) < 2:
        time.sleep(0.05)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("tables/*.parquet")}
    stopped.send_signal(signal.SIGINT)
    said = stopped.stderr.readline()
    assert stopped.wait(30) == 75 and f"asked to stop; {out}: tables of shards that were read are kept" in said
    subprocess.run([*words, *paths], check=True)
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("tables/*.parquet")}
    assert len(after) == 3 and before.items() <= after.items()
