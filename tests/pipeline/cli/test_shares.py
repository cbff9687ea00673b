"""Commands on shards give one result, whatever the number of their processes, and whichever of these are killed."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest

from pipeline.cli import main as cli
from tests.helpers.pictures import picture
from tests.helpers.saved_masks import ALL, changed, run

FORK = multiprocessing.get_context("fork")
COMMANDS = {
    "index": ["index", *ALL],
    "report": ["index", *ALL, "cut.tar", "--report", "OUT/report.jsonl"],
    "from-csv": ["shards", "from-csv", "list.csv", "--per-shard", "2"],
    "from-folder": ["shards", "from-folder", "classes", "--classes", "--per-shard", "2"],
    "apply": ["mask", "apply", "masks/one", *ALL],
    "datacomp": ["mask", "export", "masks/one", "--format", "datacomp", "--shards", *ALL],
    "keys": ["mask", "export", "masks/one", "--format", "keys"],
    "what if": ["mask", "replay", "masks/one", "--fraction", ".3"],
}
FILES = ("datacomp", "keys")  # their output is a file


@pytest.fixture
def data(here):
    """`here` with a damaged shard, a list of pictures, some rows of which are bad, and a folder of them."""
    Path("cut.tar").write_bytes(Path("data/b/00000.tar").read_bytes()[:5000])
    rows = []
    for number in range(9):
        path = Path("classes") / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number) if number != 4 else b"none")
        rows.append(f"{path if number != 7 else 'missing'},caption {number}\n")
    Path("list.csv").write_text("path,caption\n" + "".join(rows))
    return here


def words(name, out):
    target = f"{out}/file" if name in FILES else out
    return [word.replace("OUT", out) for word in COMMANDS[name]] + ["--out", target]


def made(out, leftovers=False):
    """{path: bytes} of all files below a folder."""
    files = [path for path in Path(out).rglob("*") if path.is_file()]
    return {str(p.relative_to(out)): p.read_bytes() for p in files if not (leftovers and p.name.endswith(".part"))}


def alone(capsys, name):
    """(files, what is said) of one process."""
    code, said, error = run(capsys, *words(name, "one"))
    assert code == 0 and said, error
    return made("one"), said.replace("one", "OUT")


class Process:
    """A command as the process `rank` of `world`. kill: it and its workers are killed before one of them completes its
    file of this number."""

    def __init__(self, argv, rank, world, log, kill=None):
        self.log = Path(log)
        self.process = FORK.Process(target=self.work, args=(argv, rank, world, kill))
        self.process.start()

    def work(self, argv, rank, world, kill):
        os.setsid()
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), SLURM_CPUS_PER_TASK="1")
        sys.stdout = sys.stderr = open(self.log, "w", buffering=1)
        count = []

        def counted(original):
            def function(*names):
                count.append(names)
                if kill is not None and len(count) > kill:
                    os.killpg(0, signal.SIGKILL)
                original(*names)

            return function

        os.replace, os.link = counted(os.replace), counted(os.link)
        cli.main(argv)

    def end(self):
        """(exit code, what it printed) without lines of the log."""
        self.process.join(60)
        return self.process.exitcode, "".join(
            line for line in self.log.read_text().splitlines(True) if " share " not in line
        )


def together(argv, world, **options):
    """What the processes of one job end with."""
    ranks = [Process(argv, rank, world, f"log.{rank}", **options) for rank in range(world)]
    return [process.end() for process in ranks]


@pytest.mark.parametrize("name", COMMANDS)
def test_several_processes_make_what_one_makes(data, capsys, name):
    files, said = alone(capsys, name)
    for again in range(2):  # the second time all is there
        if name == "what if" and again:
            break
        ends = together(words(name, "two"), 2)
        assert [code for code, _ in ends] == [0, 0]
        printed = "".join(text for _, text in ends).replace("two", "OUT").replace("; 2 of them", "")
        assert printed.split(", 4 of them")[0].strip() == said.strip()
        assert made("two") == files


@pytest.mark.parametrize("name", ["index", "from-csv"])
def test_processes_may_come_one_after_another(data, capsys, name):
    files, said = alone(capsys, name)
    ends = [Process(words(name, "array"), rank, 3, f"log.{rank}").end() for rank in (2, 0, 1)]
    assert [text.replace("array", "OUT") for _, text in ends] == ["", "", said]
    assert made("array") == files


KILLED = [("index", 1), ("index", 2), ("index", 3), ("from-csv", 0), ("from-csv", 3), ("from-folder", 2)]


@pytest.mark.parametrize("name, kill", [*KILLED, ("apply", 1), ("apply", 2), ("datacomp", 1)])
def test_what_was_killed_is_completed_by_one(data, capsys, name, kill):
    files, said = alone(capsys, name)
    ends = together(words(name, "two"), 2, kill=kill)
    assert -signal.SIGKILL in [code for code, _ in ends]
    before = {path: path.stat().st_mtime_ns for path in Path("two").rglob("*.tar")}
    code, text, _ = run(capsys, *words(name, "two"))
    assert code == 0 and text.split(", ")[0].split(";")[0].replace("two", "OUT") in said
    assert made("two", leftovers=name == "index") == files
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


@pytest.mark.parametrize("name", ["index", "from-csv", "apply"])
def test_two_jobs_of_the_same_input_do_each_other_no_harm(data, capsys, name):
    files, said = alone(capsys, name)
    jobs = [Process(words(name, "two"), 0, 1, f"log.{number}") for number in range(2)]
    assert [job.end()[0] for job in jobs] == [0, 0] and made("two") == files


@pytest.mark.parametrize("name", ["index", "apply"])
def test_a_wrong_shard_is_told_once_and_costs_no_other(data, capsys, name):
    files, _ = alone(capsys, name)
    path = Path("data/a/00002.tar")
    whole, times = path.read_bytes(), path.stat()
    if name == "index":
        path.write_bytes(whole[:3000])
    else:
        changed(path)
    ends = together(words(name, "two"), 2)
    assert sorted(code for code, _ in ends) == [0, 2]
    assert "".join(text for _, text in ends).count("00002.tar") == 1
    there = made("two")
    assert sum(content in there.values() for content in files.values()) >= 3  # what is made of the other shards
    path.write_bytes(whole)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert run(capsys, *words(name, "two"))[0] == 0
    assert {key: value for key, value in made("two").items() if key in files} == files


def test_a_shard_that_is_missing_is_named_by_one_of_them(data):
    os.unlink("data/a/00001.tar")
    ends = together(words("index", "two"), 2)
    assert sorted(code for code, _ in ends) == [0, 2]
    assert "".join(text for _, text in ends).count("00001.tar: missing") == 1 and not Path("two/index.json").exists()


def test_a_mistake_is_told_once_and_ends_all(data):
    ends = together([*words("index", "two"), "--text", "A b"], 2)
    assert [code for code, _ in ends] == [2, 2] and "".join(text for _, text in ends).count("--text: got") == 1


def test_a_list_of_which_nothing_can_be_used_is_told_once(data, capsys):
    Path("list.csv").write_text("path,caption\n" + "missing,x\n" * 5)
    ends = together(words("from-csv", "two"), 2)
    assert sorted(code for code, _ in ends) == [0, 2] and "".join(text for _, text in ends).count("none of 5 rows") == 1
    Path("list.csv").write_text("path,caption\nclasses/a/0.png,x\n")
    assert [code for code, _ in together(words("from-csv", "two"), 2)] == [0, 0]
    run(capsys, *words("from-csv", "one"))
    assert made("two") == made("one")
