"""Logging: what appears on stderr and in a rank's file, by level and rank."""

import logging
import re
import socket

import pytest

from pipeline import logs
from shards.errors import UserError

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


@pytest.fixture(autouse=True)
def nothing_stays_set_up(monkeypatch):
    monkeypatch.delenv(logs.VARIABLE, raising=False)
    yield
    for kind in ("console", "file"):
        logs.replace(kind, None)
    for package in logs.PACKAGES:
        logging.getLogger(package).setLevel(logging.NOTSET)


def said(capsys, rank=0, monkeypatch=None, level=None):
    """stderr of one line of each level."""
    if rank:
        monkeypatch.setenv("RANK", str(rank))
    logs.set_up(level)
    for name in ("debug", "info", "warning"):
        getattr(logging.getLogger("pipeline.any"), name)(f"a line of {name}")
        getattr(logging.getLogger("another_package"), name)(f"{name} of another package")
    return capsys.readouterr().err.splitlines()


def test_rank_0_has_every_line_and_the_level_only_where_it_is_not_info(capsys):
    line, warning, other = said(capsys)
    assert re.fullmatch(f"{TIME} a line of info", line)
    assert re.fullmatch(f"{TIME} WARNING a line of warning", warning)
    assert re.fullmatch(f"{TIME} WARNING warning of another package", other)


def test_other_ranks_have_warnings_with_their_origin(capsys, monkeypatch):
    origin = re.escape(f"rank 3 {socket.gethostname()}: ")
    warning, other = said(capsys, 3, monkeypatch)
    assert re.fullmatch(f"{TIME} WARNING {origin}a line of warning", warning) and "another package" in other


def test_without_torchrun_slurm_says_the_rank(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert logs.rank() == 3 and len(said(capsys)) == 2
    assert said(capsys, level="ERROR") == []


def test_the_level_is_that_of_the_argument_or_of_the_variable(capsys, monkeypatch):
    monkeypatch.setenv(logs.VARIABLE, "error")
    assert said(capsys) == []
    assert [line.rpartition(" ")[2] for line in said(capsys, level="DEBUG")] == ["debug", "info", "warning", "package"]
    monkeypatch.setenv(logs.VARIABLE, "loud")
    with pytest.raises(UserError, match="SAFECLIP_LOG_LEVEL.*'LOUD'.*DEBUG, INFO, WARNING, ERROR"):
        logs.set_up()


def test_a_file_is_appended_to_and_rotated(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logs, "MAX_BYTES", 2000)
    logger, file = logging.getLogger("shards.any"), tmp_path / "logs" / "rank_0.log"
    for start in range(2):
        logs.open_file(file.parent)
        logger.info(f"start {start}")
        logs.close_file(ValueError("broken") if start else None)
        logger.info("after the end")
    text = file.read_text()
    origin = re.escape(f"rank 0 {socket.gethostname()}: ")
    assert re.match(f"{TIME} {origin}start 0\n{TIME} {origin}start 1\n{TIME} ERROR {origin}", text)
    assert text.endswith("ValueError: broken\n") and "after the end" not in text
    logs.open_file(file.parent)
    for number in range(500):
        logger.info(f"line {number}")
    sizes = {path.name: path.stat().st_size for path in file.parent.iterdir()}
    assert sizes.keys() == {"rank_0.log", "rank_0.log.1", "rank_0.log.2"} and max(sizes.values()) <= 2000
    assert file.read_text().endswith("line 499\n") and not capsys.readouterr().err
