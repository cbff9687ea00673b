"""Progress of a loop on a terminal and elsewhere."""

import io
import logging
import sys

import pytest

from shards import progress as module
from shards.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def every_item(monkeypatch):
    monkeypatch.setattr(module, "EVERY", 0.0)


def test_lines_where_stderr_is_no_terminal(caplog, capsys, every_item):
    with caplog.at_level(logging.INFO, "shards.progress"):
        assert list(progress(iter("abc"), 3, "shards indexed")) == ["a", "b", "c"]
    assert caplog.messages == [f"{done} of 3 shards indexed" for done in (1, 2, 3)]
    assert "%" not in capsys.readouterr().err  # no bar


def test_a_line_at_most_every_so_many_seconds(caplog):
    with caplog.at_level(logging.INFO, "shards.progress"):
        assert len(list(progress(range(1000), 1000, "shards indexed"))) == 1000
    assert not caplog.messages


def test_a_bar_on_a_terminal(caplog, monkeypatch, every_item):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with caplog.at_level(logging.INFO, "shards.progress"):
        assert list(progress(range(3), 3, "shards indexed")) == [0, 1, 2]
    assert "shards indexed: 100%" in sys.stderr.getvalue() and "3/3" in sys.stderr.getvalue() and not caplog.messages


@pytest.mark.parametrize("stderr", [io.StringIO, Terminal])
def test_nothing_where_it_is_not_shown(caplog, monkeypatch, every_item, stderr):
    monkeypatch.setattr(sys, "stderr", stderr())
    with caplog.at_level(logging.INFO, "shards.progress"):
        assert list(progress(range(3), 3, "shards indexed", shown=False)) == [0, 1, 2]
    assert not sys.stderr.getvalue() and not caplog.messages
