"""What the commands share: how their options are read, and the overrides of a config."""

import re

import click

from shards.errors import UserError
from shards.storage.paths import expanded


class Path(click.ParamType):
    """A path, in which ~ and variables are replaced."""

    name = "path"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return expanded(value)
        except UserError as error:
            raise UserError(f"{param.opts[0]}: {error}") from None


PATH, COUNT = Path(), click.IntRange(min=1)
FRACTION = click.FloatRange(0, 1, min_open=True, max_open=True)
POSITIVE = click.FloatRange(min=0, min_open=True)
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[a.b=value]...")


class Command(click.Command):
    """Command whose options take several values if they are `multiple`: `--data A B` is read as `--data A --data B`.

    The name of an option is never read as the value of the option before it.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options = [param for param in self.params if isinstance(param, click.Option) and not param.is_flag]
        multiple = {name: option.multiple for option in options for name in option.opts}
        words: list[str] = []
        current = None  # the multiple option whose values are read
        for word, following in zip(args, [*args[1:], "--"]):
            if word in multiple and following.startswith("--"):
                raise click.BadOptionUsage(word, f"Option {word!r} requires an argument.", ctx)
            if word.startswith("-"):
                current = word if multiple.get(word) else None
            elif re.match(r"\w+(\.\w+)+=", word):  # an override
                current = None
            elif current and words[-1] != current:
                words.append(current)
            words.append(word)
        return super().parse_args(ctx, words)


class Group(click.Group):
    """Group that lists its commands in the order in which they are added."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def tell(text: str | None) -> None:
    """Print what a command has done; None: another of its processes prints it."""
    if text is not None:
        print(text)
