"""Guards: what SafeCLIP pre-training has beyond the paper, one file each, none of it on unless a config names it."""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, get_type_hints

from pipeline.guards.base import Guard
from pipeline.guards.duplicates import Duplicates
from pipeline.guards.trigger_clusters import TriggerClusters
from shards.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

REGISTRY: dict[str, type[Guard]] = {guard.name: guard for guard in (Duplicates, TriggerClusters)}


def make_guards(values: dict) -> list[Guard]:
    """The guards of a config's `guards`: {NAME: {setting: value}}; NAME: null is off. Raises UserError naming the
    key."""
    found = {name: settings_of(name, {} if given is None else given) for name, given in values.items()}
    return [REGISTRY[name](settings) for name, settings in found.items() if values[name] is not None]


def complete(values: dict) -> dict:
    """The same with every setting of the guards that are on, so that a config holds all that decides. Raises
    UserError."""
    return {guard.name: dataclasses.asdict(guard.settings) for guard in make_guards(values)}


def settings_of(name: str, given: dict) -> "DataclassInstance":
    """A guard's Settings. Raises UserError for an unknown guard or setting, and for a value of the wrong type or out of
    bounds."""
    if name not in REGISTRY:
        raise UserError(f"guards.{name}: unknown; {near(name, REGISTRY)}")
    kind = REGISTRY[name]
    types = get_type_hints(kind.Settings)
    if not isinstance(given, dict):
        raise UserError(f"guards.{name}: got {given!r}, expected settings ({{}}: the defaults), or null (off)")
    for key, value in given.items():
        if key not in types:
            raise UserError(f"guards.{name}.{key}: unknown; {near(key, types)}")
        allowed = (int,) if types[key] is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, allowed) or value != value:
            raise UserError(
                f"guards.{name}.{key}: got {value!r}, expected {'a whole' if types[key] is int else 'a'} number"
            )
        low, high = kind.BOUNDS[key]
        if low is not None and value < low or high is not None and value > high:
            text = f"{low} or more" if high is None else f"{low} to {high}"
            raise UserError(f"guards.{name}.{key}: got {value}, expected {text}")
    return kind.Settings(**{key: types[key](value) for key, value in given.items()})


def near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), 1)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
