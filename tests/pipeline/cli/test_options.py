"""How the command line is read: options with several values, mistakes in one line, help."""

import os
import re
import subprocess
import sys

import click
import pytest

from pipeline.cli.main import main, safeclip
from pipeline.cli.options import OVERRIDES, Command


@click.command(cls=Command)
@click.argument("run")
@OVERRIDES
@click.option("--several", multiple=True)
@click.option("--one", type=float)
@click.option("--flag", is_flag=True)
def command(**options):
    return options


def read(*words):
    with command.make_context("command", list(words)) as context:
        return command.invoke(context)


@pytest.mark.parametrize(
    "words, several, overrides",
    [
        ("RUN", (), ()),
        ("RUN --several a", ("a",), ()),
        ("RUN --several a b c", ("a", "b", "c"), ()),
        ("RUN --several a b --one 2", ("a", "b"), ()),
        ("--several a b --flag RUN", ("a", "b"), ()),
        ("--several a b --one 2 RUN x=1 y=2", ("a", "b"), ("x=1", "y=2")),
        ("RUN x=1 --several a b --flag y=2", ("a", "b"), ("x=1", "y=2")),
        ("RUN x=1 --several=a y=2", ("a",), ("x=1", "y=2")),
        ("RUN --several a b --several c", ("a", "b", "c"), ()),
        ("RUN --one -1 x=-1", (), ("x=-1",)),
    ],
)
def test_an_option_takes_several_values(words, several, overrides):
    options = read(*words.split())
    assert (options["run"], options["several"], options["overrides"]) == ("RUN", several, overrides)


MISTAKES = {
    "": ("Missing command", "safeclip"),
    "trian config.yaml": ("'trian'", "safeclip"),
    "mask": ("Missing command", "safeclip mask"),
    "mask sow": ("'sow'", "safeclip mask"),
    "train": ("'CONFIG'", "safeclip train"),
    "train config.yaml --size 3": ("--size", "safeclip train"),
    "export run": ("'OUT'", "safeclip export"),
    "compare a b c --out d": ("(c)", "safeclip compare"),
    "index --out x": ("'SHARDS...'", "safeclip index"),
    "index a.tar --out": ("--out", "safeclip index"),
    "index a.tar --allow-pipe=1 --out x": ("--allow-pipe", "safeclip"),
    "score --data --out x": ("--data", "safeclip score"),
    "score --data a b": ("--out", "safeclip score"),
    "score --out --lean": ("--out", "safeclip score"),
    "audit run --out x --sample many": ("--sample", "safeclip audit"),
    "mask filter scores --out x": ("cosine, kdistance, slof, dao", "safeclip mask filter"),
    "mask filter scores --out x --by size": ("'size'", "safeclip mask filter"),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_in_the_words_is_one_line(words, capsys):
    names, asks = MISTAKES[words]
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    out, error = capsys.readouterr()
    assert error.startswith("safeclip: ") and names in error and error.endswith(f" (see `{asks} --help`)\n")
    assert not out and error.count("\n") == 1


def parameters(group=safeclip, words=()):
    """(words of the command, parameter) of every command."""
    for name, one in group.commands.items():
        if isinstance(one, click.Group):
            yield from parameters(one, (*words, name))
        else:
            yield from (((*words, name), param) for param in one.params)


# Of the words of the command line those that are no path.
OTHER = {"image", "overrides", "name", "path", "caption", "separator", "text", "detectors", "form", "keep", "by"}


def test_every_word_that_is_no_choice_or_number_is_a_path():
    for words, param in parameters():
        if isinstance(param.type, (click.types.StringParamType, click.Choice)):
            assert param.name in OTHER, (words, param.name)


def test_home_and_variables_are_replaced_in_words(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", "data")
    monkeypatch.delenv("UNSET", raising=False)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pairs.csv").write_text("path,caption\n")
    for words in ("index ~/$DATA/{0..1}.tar --out=~/x", "score --data a.tar ~/$DATA/0.tar --model ~/m --out x"):
        with pytest.raises(SystemExit, match="2"):
            main(words.split())
        assert str(tmp_path) in capsys.readouterr().err
    for words, name in {"export $UNSET x": "run", "index a --out=$UNSET/x": "--out"}.items():
        with pytest.raises(SystemExit, match="2"):
            main(words.split())
        error = capsys.readouterr().err
        assert error.startswith(f"safeclip: {name}: got '$UNSET") and error.count("\n") == 1


@pytest.mark.parametrize("words", [["config"], ["--help"]])
def test_output_that_nobody_reads_is_no_traceback(words):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "pipeline.cli", *words], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 1 and not done.stderr


def test_two_rules_for_a_mask_exclude_each_other(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["mask", "replay", "mask", "--posterior", "0.5", "--fraction", "0.5", "--out", "x"])
    error = capsys.readouterr().err
    assert "--posterior and --fraction exclude each other" in error and error.count("\n") == 1


@pytest.mark.parametrize("words", ["train", "train nowhere.yaml"])
def test_one_rank_alone_says_what_is_wrong(words, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    assert capsys.readouterr() == ("", "")


def test_what_another_host_alone_lacks_is_said_by_its_first_process(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit, match="2"):
        main(["train", "nowhere.yaml"])
    assert re.fullmatch(r"safeclip: rank 8 \S+: config \S+/nowhere.yaml: .*\n", capsys.readouterr().err)


def test_a_later_process_of_srun_is_not_the_first_because_its_gpu_is(capsys, monkeypatch):
    for name, value in {"RANK": "9", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(SystemExit, match="2"):
        main(["train", "nowhere.yaml"])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_lists_the_commands_in_the_order_of_their_use(option, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([option])
    listed = capsys.readouterr().out.partition("Commands:")[2]
    assert [line.split()[0] for line in listed.splitlines() if line] == list(safeclip.commands)
    assert list(safeclip.commands)[:3] == ["data", "shards", "index"] and "..." not in listed
