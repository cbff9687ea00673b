"""Paths as users write them: ~ and variables are replaced once."""

import pytest

from shards.errors import UserError
from shards.storage.paths import escaped, expanded


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    monkeypatch.setenv("HOME", "/home/a")
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("ODD", "/o$DATA~")
    monkeypatch.delenv("UNSET", raising=False)


@pytest.mark.parametrize(
    "path, found",
    {
        "": "",
        "a/b": "a/b",
        "~": "/home/a",
        "~/x": "/home/a/x",
        "a~/~": "a~/~",
        "$DATA/x": "/data/x",
        "${DATA}_2/{00..10}.tar": "/data_2/{00..10}.tar",
        "~/$DATA": "/home/a//data",
        "$ODD/x": "/o$DATA~/x",  # what a variable holds is not read again
        "$$DATA/5$/${0..3}": "$DATA/5$/${0..3}",
        "s3://bucket/~/$UNSET": "s3://bucket/~/$UNSET",
        "pipe:cat ~/x | awk '{print $1 $UNSET}'": "pipe:cat ~/x | awk '{print $1 $UNSET}'",
    }.items(),
)
def test_a_path_is_expanded(path, found):
    assert expanded(path) == found
    assert expanded(escaped(found)) == found or found[:1] == "~"


@pytest.mark.parametrize("path", ["$UNSET/x", "a/${UNSET}", "~nobody_of_this_name/x", "a\0b"])
def test_what_cannot_be_expanded_is_named(path):
    with pytest.raises(UserError, match="^got ") as error:
        expanded(path)
    assert "\n" not in str(error.value)
    if "UNSET" in path:
        assert "$UNSET is not set; set it" in str(error.value)
