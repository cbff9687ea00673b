"""Shards are named by paths, braces, wildcards and lists, mixed; a mistake is one line."""

import pytest

from shards.errors import UserError
from shards.index.names import named


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, with a/0.tar to a/3.tar, [b].tar and d[1]/0.tar."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "d[1]").mkdir()
    for name in (*(f"a/{number}.tar" for number in range(4)), "[b].tar", "d[1]/0.tar"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    "patterns, wanted",
    [
        (["a/{1..2}.tar"], ["a/1.tar", "a/2.tar"]),
        (["a/*.tar"], ["a/0.tar", "a/1.tar", "a/2.tar", "a/3.tar"]),
        (["**/1.tar", "a/?.tar"], ["a/1.tar", "a/0.tar", "a/1.tar", "a/2.tar", "a/3.tar"]),
        (["d[1]/*.tar"], ["d[1]/0.tar"]),
        (["d[1]/{0..1}.tar"], ["d[1]/0.tar", "d[1]/1.tar"]),
        (["[b].tar"], ["[b].tar"]),
        (
            ["a/{3..2}.tar::a/0.tar", "http://h/{0..1}.tar"],
            ["a/3.tar", "a/2.tar", "a/0.tar", "http://h/0.tar", "http://h/1.tar"],
        ),
        (["simplecache::s3://b/0.tar::a/*0.tar"], ["simplecache::s3://b/0.tar", "a/0.tar"]),
        (["pipe:cat a::b*.tar"], ["pipe:cat a::b*.tar"]),
        (["list.txt", "a/3.tar"], ["s3://b/0.tar", "a/1.tar", "a/2.tar", "a/0.tar", "a/3.tar"]),
        (["@other"], ["a/0.tar"]),
        (["@home"], ["a/1.tar", "a/0.tar", "pipe:cat $HOME/x"]),
        (["gone/{0..1}.tar"], ["gone/0.tar", "gone/1.tar"]),
    ],
)
def test_shards_are_named_in_many_ways(here, monkeypatch, patterns, wanted):
    monkeypatch.setenv("HOME", "a")
    (here / "list.txt").write_text("\ufeff# ours\ns3://b/0.tar\n\n a/{1..2}.tar::a/0*.tar\r\n")
    (here / "other").write_text("a/0.tar")
    (here / "home").write_text("~/1.tar::$HOME/0.tar\npipe:cat $HOME/x\n")
    assert named(patterns) == wanted


@pytest.mark.parametrize(
    "pattern, said",
    [
        ("a/{0..3.tar", "Unbalanced|unbalanced"),
        ("a/x*.tar", "matches no file"),
        ("@nothing", "list nothing: No such file"),
        ("a.txt", "list a.txt: No such file"),
        ("@a", "list a: Is a directory"),
        ("@utf16", "list utf16: not UTF-8"),
        ("@empty", "names no shard"),
        ("@nested", "names a list, @nested"),
        ("@unset", r"list unset: got '\$NOT_SET/0.tar', but \$NOT_SET is not set"),
    ],
)
def test_a_mistake_in_names_is_named(here, pattern, said):
    (here / "utf16").write_text("a/0.tar", encoding="utf-16")
    (here / "empty").write_text("# nothing\n")
    (here / "nested").write_text("@nested\n")
    (here / "unset").write_text("$NOT_SET/0.tar\n")
    with pytest.raises(UserError, match=said) as error:
        named([pattern])
    assert "\n" not in str(error.value)
