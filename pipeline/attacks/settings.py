"""Settings of attacks and triggers: dataclasses whose numbers have bounds, read from the mappings of a YAML file."""

import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from shards.errors import UserError
from shards.storage.files import write_bytes

if TYPE_CHECKING:
    from _typeshed import DataclassInstance  # there is no such module where this runs

Number = TypeVar("Number", bound=float | None)
Settings = TypeVar("Settings", bound="DataclassInstance")


def bounded(default: Number, low: float, high: float) -> Number:
    """A dataclass field: a number from `low` to `high`."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high})


def one_of(*choices: str) -> str:
    """A dataclass field: one of these words, the first by default."""
    return dataclasses.field(default=choices[0], metadata={"choices": choices})


@dataclass(frozen=True)
class Count:
    """How many pairs are poisoned: either of the two."""

    pairs: int | None = bounded(None, 1, 10**9)
    """Number of pairs."""
    rate: float | None = bounded(None, 1e-8, 0.5)
    """Fraction of all pairs: 0.004 is 0.4 %."""

    def of(self, samples: int, where: str) -> int:
        """The number of pairs among `samples`. Raises UserError unless just one of the two is given."""
        if (self.pairs is None) == (self.rate is None):
            got = "neither" if self.pairs is None else "both"
            raise UserError(
                f"{where}.pairs: got {got} of pairs and rate; expected one, such as pairs: 200 or rate: 0.004"
            )
        return self.pairs or max(1, round(self.rate * samples))


def read(kind: type[Settings], values: object, where: str) -> Settings:
    """An instance of the dataclass `kind` with the mapping `values`. Raises UserError naming `where`.KEY for what it
    does not know, for another type, and for what is out of bounds."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: got {values!r}, expected a mapping of settings")
    known = {f.name: f for f in dataclasses.fields(kind)}
    found = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{where}.{key}: unknown; expected {', '.join(known)}")
        found[key] = checked(known[key], value, f"{where}.{key}")
    return kind(**found)


def checked(field: dataclasses.Field, value: object, where: str) -> object:
    """`value` as the type of a dataclass field, within its bounds. Raises UserError."""
    kinds = typing.get_args(field.type) or (field.type,)
    if float in kinds and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)  # YAML reads 5e-4 as a string
        except ValueError:
            pass
    if not isinstance(value, kinds) or isinstance(value, bool) and bool not in kinds:
        names = " or ".join("null" if one is type(None) else one.__name__ for one in kinds)
        raise UserError(f"{where}: got {value!r}, expected {names}")
    bounds = field.metadata
    if value is not None and "low" in bounds and not bounds["low"] <= value <= bounds["high"]:
        raise UserError(f"{where}: got {value}, expected {bounds['low']:g} to {bounds['high']:g}")
    if "choices" in bounds and value not in bounds["choices"]:
        raise UserError(f"{where}: got {value!r}, expected {' or '.join(bounds['choices'])}")
    return value


def write_named(path: str | Path, data: bytes, where: str) -> None:
    """Put `data` at `path`, that the option or key `where` names. Raises UserError where it cannot be
    written."""
    try:
        write_bytes(path, data)
    except OSError as error:
        raise UserError(f"{where}: cannot write {path} ({error.strerror or error}); name another place") from None
