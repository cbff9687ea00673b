"""Detectors of suspect pairs. Each is a class in a module of this package with @detector above it; nothing else names
it.

Scores are float32 (N,) in 0..1, lower = worse, NaN = not judged, as in cleanlab's Datalab; so are the names
is_<name>_issue and <name>_score.
"""

import importlib
import importlib.util
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from pipeline.audit.blocks import lowest_flags
from pipeline.audit.data import AuditData
from shards.errors import UserError

MEMBERS = 500  # of a group, that are kept

REGISTRY: dict[str, type["Detector"]] = {}
Kind = TypeVar("Kind", bound=type["Detector"])


def detector(kind: Kind) -> Kind:
    """Class decorator: put a Detector into the registry under its name."""
    REGISTRY[kind.name] = kind
    return kind


@dataclass
class Group:
    """Pairs that belong together: a caption that is repeated, a patch. rows: int64, the worst MEMBERS of them, the
    worst first; size: of all, where it is more than `rows` are given."""

    title: str
    text: str
    rows: np.ndarray
    badness: float  # groups are shown in the order of this, highest first
    # (left, top, right, bottom) of the pictures, in fractions, where a patch lies
    box: tuple[float, float, float, float] | None = None
    size: int = 0

    def __post_init__(self) -> None:
        self.size = self.size or len(self.rows)
        self.rows = self.rows[:MEMBERS].copy()  # of its own: a view would keep all that it is taken from


@dataclass
class Finding:
    """What one detector says. score_N: float32 (N,), lower = worse; issue_N: bool (N,). more: further columns {name:
    (N,)}."""

    score_N: np.ndarray
    issue_N: np.ndarray
    groups: list[Group] = field(default_factory=list)
    more: dict[str, np.ndarray] = field(default_factory=dict)


class Detector(ABC):
    """name: of its columns. title, text: for people. source: paper. needs: attributes of AuditData that must not be
    None or empty. least: scored pairs below which it is skipped.

    ranks: whether its score orders pairs, so that it counts in the combined score; family: those that look at the same
    thing. package: an optional one that it needs, which `pip install` knows by this name; with one it runs only where
    it is named.
    """

    name = title = text = source = family = package = ""
    needs: tuple[str, ...] = ()
    least = 0
    ranks = True

    @abstractmethod
    def find(self, data: AuditData, worst: float) -> Finding:
        """What it says of `data`. worst: the fraction of the pairs that a detector without a threshold of its own
        flags."""

    @staticmethod
    def reason(score: float) -> str:
        """What the report says of a flagged pair with this score, beside the title; "" = nothing."""
        return ""


LACKS = {
    "images": "no embeddings: make them with `safeclip score`, without --lean",
    "texts": "no embeddings: make them with `safeclip score`, without --lean",
    "cells": "no picture hashes: `safeclip score` makes them where it reads the pictures itself",
    "hash_N": "no picture hashes: `safeclip score` makes them where it reads the pictures itself",
    "captions": "no captions: the shards are not where they were",
    "rounds": "no run: scores alone have no history",
    "excluded": "no run whose guards excluded pairs (config key guards)",
}


def lacking(kind: type[Detector], data: AuditData) -> str | None:
    """Why a detector cannot run on this data, as a line; None if it can."""
    for name in kind.needs:
        value = getattr(data, name)
        if value is None or (isinstance(value, Sized) and not len(value)):
            return f"no pictures: {data.no_pictures}" if name == "samples" else LACKS[name]
    scored = int((~np.isnan(data.score_N)).sum()) if kind.least else 0
    return f"{scored} scored pairs, at least {kind.least} are needed" if scored < kind.least else None


def chosen(names: Sequence[str] | None) -> list[str]:
    """Names of the detectors that --detectors means: a detector, a family, or "default", which is all that need no
    optional package. Raises UserError."""
    default = [name for name, kind in REGISTRY.items() if not kind.package]
    found: dict[str, None] = {}  # in order, each once
    for word in names or ["default"]:
        family = [name for name, kind in REGISTRY.items() if word in (name, kind.family)]
        if word != "default" and not family:
            families = {kind.family: None for kind in REGISTRY.values() if kind.family}
            raise UserError(
                f"--detectors: got {word!r}, expected some of {', '.join(['default', *families, *REGISTRY])}"
            )
        found.update(dict.fromkeys(default if word == "default" else family))
    for name in found:
        package = REGISTRY[name].package
        if package and not importlib.util.find_spec(package):
            raise UserError(f"--detectors: {name} needs the package {package}, which is missing; pip install {package}")
    return list(found)


def lowest(score_N: np.ndarray, fraction: float) -> np.ndarray:
    """bool (N,): the `fraction` of the pairs with the lowest scores, of those below 1; ties are broken by the row."""
    judged_N = score_N < 1  # NaN is not
    count = min(int(judged_N.sum()), int(np.ceil(fraction * len(score_N))))
    flags_N = np.zeros(len(score_N), bool)
    flags_N[judged_N] = lowest_flags(score_N[judged_N], count)
    return flags_N


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
