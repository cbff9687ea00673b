"""Guards: what SafeCLIP pre-training has beyond the paper, one file each, none of it on unless a config names it."""

from typing import Any

from pydantic import create_model

from pipeline.guards.base import Guard
from pipeline.guards.duplicates import Duplicates
from pipeline.guards.trigger_classifier import TriggerClassifier
from pipeline.guards.trigger_clusters import TriggerClusters
from pipeline.settings import Section, read

REGISTRY: dict[str, type[Guard]] = {guard.name: guard for guard in (Duplicates, TriggerClusters, TriggerClassifier)}
ALL: dict[str, Any] = {name: (guard.Settings | None, None) for name, guard in REGISTRY.items()}
Guards = create_model("Guards", __base__=Section, **ALL)


def make_guards(values: dict) -> list[Guard]:
    """The guards of a config's `guards`: {NAME: {setting: value}}; NAME: null is off. Raises UserError naming the
    key."""
    found = read(Guards, values, "guards.")
    return [REGISTRY[name](getattr(found, name)) for name in values if values[name] is not None]


def complete(values: dict) -> dict:
    """The same with every setting of the guards that are on, so that a config holds all that decides. Raises
    UserError."""
    return {guard.name: guard.settings.model_dump() for guard in make_guards(values)}
