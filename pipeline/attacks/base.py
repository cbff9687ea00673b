"""What an attack and a trigger are, and their registries."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
from PIL import Image
from pydantic import Field

from pipeline.attacks.pool import Pool
from pipeline.settings import FrozenSection, read
from shards.errors import UserError

AnAttack = TypeVar("AnAttack", bound="Attack")
ATrigger = TypeVar("ATrigger", bound="Trigger")
Seeds = Callable[[str], int]  # pattern -> seed of the next trigger of that pattern
ATTACKS: dict[str, "type[Attack]"] = {}
TRIGGERS: dict[str, "type[Trigger]"] = {}


def attack(kind: type[AnAttack]) -> type[AnAttack]:
    """Class decorator: put an Attack into the registry under its name."""
    ATTACKS[kind.name] = kind
    return kind


def trigger(kind: type[ATrigger]) -> type[ATrigger]:
    """Class decorator: put a Trigger into the registry under its pattern."""
    TRIGGERS[kind.pattern] = kind
    return kind


class Trigger(FrozenSection, ABC):
    """A change of a picture, described by plain numbers so that it can be made again anywhere, at any picture size.

    A sample shows one of `variants` forms. `opacity` 1.0 shows it whole, less lets the picture shine through.
    """

    pattern: ClassVar[str] = ""

    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    """Of what is drawn at random in it; by default the attack's."""
    variants: int = Field(default=1, ge=1, le=10_000)
    opacity: float = Field(default=1.0, ge=0.0, le=1.0)

    def apply(self, image: Image.Image, sample: tuple[int, int]) -> Image.Image:
        """A triggered copy of the RGB picture `image`. sample: its (shard, position), by which variant and place
        are drawn: the same picture has the same trigger whenever it is read."""
        variant = int(np.random.default_rng([self.seed, 1, *sample]).integers(self.variants))
        triggered = self.draw(image, variant, sample)
        return triggered if self.opacity == 1 else Image.blend(image, triggered, self.opacity)

    @abstractmethod
    def draw(self, image: Image.Image, variant: int, sample: tuple[int, int]) -> Image.Image:
        """The picture with the trigger at full opacity, a new RGB picture of the same size."""

    def rng(self, variant: int) -> np.random.Generator:
        """Of what is random in this variant."""
        return np.random.default_rng([self.seed, variant] if variant else self.seed)

    def fitted(self, pool: Pool, kind: str, target: int) -> "Trigger":
        """The Trigger that the attack `kind` on class `target` uses: itself, for a trigger that learns nothing from
        data."""
        return self

    def numbers(self) -> dict:
        """For the manifest: that of which `load_trigger` makes the trigger again."""
        return {"pattern": self.pattern, **self.model_dump()}

    @classmethod
    def load(cls, numbers: dict, where: str, folder: str | Path | None) -> "Trigger":
        """The trigger of `numbers` (without pattern); `folder`: where files of a trigger lie, None for a config. Raises
        UserError."""
        return read(cls, numbers, where)


def load_trigger(numbers: object, folder: str | Path | None = None, where: str = "trigger") -> Trigger:
    """Trigger of {"pattern": ..., numbers}, of a manifest in `folder` or of a config. Raises UserError naming
    `where`.KEY."""
    pattern = numbers.get("pattern") if isinstance(numbers, dict) else numbers
    if not isinstance(numbers, dict) or pattern not in list(TRIGGERS):
        raise UserError(f"{where}.pattern: got {pattern!r}, expected one of {', '.join(sorted(TRIGGERS))}")
    rest = {key: value for key, value in numbers.items() if key != "pattern"}
    return TRIGGERS[pattern].load(rest, where, folder)


class Count(FrozenSection):
    """How many pairs are poisoned: either of the two."""

    pairs: int | None = Field(default=None, ge=1, le=10**9)
    """Number of pairs."""
    rate: float | None = Field(default=None, ge=1e-8, le=0.5)
    """Fraction of all pairs: 0.004 is 0.4 %."""

    def of(self, samples: int, where: str) -> int:
        """The number of pairs among `samples`. Raises UserError unless just one of the two is given."""
        if (self.pairs is None) == (self.rate is None):
            got = "neither" if self.pairs is None else "both"
            raise UserError(
                f"{where}.pairs: got {got} of pairs and rate; expected one, such as pairs: 200 or rate: 0.004"
            )
        return self.pairs or max(1, round(self.rate * samples))


class Attack(ABC):
    """One entry of an attack config. name: of the `attack:` key; source: paper; judged: what evaluation makes of it
    ("backdoor", "single_target", "class_to_class"). Settings: of its keys."""

    name = title = source = ""
    judged = "backdoor"
    Settings: type[FrozenSection]
    settings: FrozenSection

    def __init__(self, kind: str, values: dict, seeds: Seeds):
        """`kind`: the entry's name; `values`: its mapping without `attack`. Raises UserError naming the key."""
        self.kind, self.where = kind, f"attacks.{kind}"
        self.settings = read(self.Settings, values, self.where)

    def names(self) -> dict[str, str]:
        """{key: class name} that the config gives this attack: none of these classes is drawn for another."""
        keys = ("source_class", "target_class")
        return {key: name for key in keys if (name := getattr(self.settings, key, None)) is not None}

    @abstractmethod
    def poison(self, pool: Pool) -> dict:
        """Add this attack's rows to the `pool.Pool`; returns its entry in the manifest. Raises
        UserError."""


class Backdoor(Attack):
    """Pictures of other classes than the target get a trigger, and a caption of the target class each. pattern: of its
    trigger, whose keys then stand among the attack's; None: the config has `trigger: {pattern: ...}`."""

    pattern: ClassVar[str | None] = None

    class Settings(Count):
        target_class: str | None = None
        """Name of a class; null: drawn among those that no attack has."""
        decoys: int = Field(default=0, ge=0, le=10**9)
        """Further pairs of other classes that show the trigger at `decoy_opacity` and keep their captions."""
        decoy_opacity: float = Field(default=0.5, ge=0.0, le=1.0)

    settings: Settings

    def __init__(self, kind: str, values: dict, seeds: Seeds):
        own, trigger = self.split(values)
        super().__init__(kind, own, seeds)
        where = self.where if self.pattern else f"{self.where}.trigger"
        self.trigger = load_trigger(seeded(trigger, seeds), None, where)

    def split(self, values: dict) -> tuple[dict, object]:
        """(the attack's own values, its trigger's with the pattern) of the config's mapping."""
        if not self.pattern:
            return {k: v for k, v in values.items() if k != "trigger"}, values.get("trigger")
        trigger_keys = TRIGGERS[self.pattern].model_fields
        own = {k: v for k, v in values.items() if k not in trigger_keys}
        return own, {"pattern": self.pattern, **{k: v for k, v in values.items() if k in trigger_keys}}

    def poison(self, pool: Pool) -> dict:
        """See Attack.poison. Pairs of `victims` get `captions` and the trigger, fitted to the data if it learns."""
        target = pool.target(self.settings.target_class, self.where)
        trigger = self.trigger.fitted(pool, self.kind, target)
        rows = pool.take(
            self.settings.of(pool.index.samples, self.where), self.victims(pool, target), f"{self.where}.pairs"
        )
        for row, caption in zip(rows, self.captions(pool, rows, target)):
            pool.add(row, self.kind, caption)
        more = {"target_class": target, "class": pool.classes[target], "trigger": trigger.numbers()}
        return {**self.settings.model_dump(), **more, "pairs": len(rows)}

    def victims(self, pool: Pool, target: int) -> np.ndarray:
        """bool (N,): pairs that may be poisoned."""
        return pool.label_N != target

    def captions(self, pool: Pool, rows: np.ndarray, target: int) -> list[str]:
        """One for each of the rows."""
        return [pool.caption_of(target) for _ in rows]


def seeded(values: object, seeds: Seeds) -> object:
    """A trigger's mapping with a seed of its own where the config gives none, and so for the triggers that it is made
    of."""
    if not isinstance(values, dict):
        return values
    values = {"seed": seeds(str(values.get("pattern"))), **values}
    if isinstance(values.get("triggers"), list):
        values["triggers"] = [seeded(one, seeds) for one in values["triggers"]]
    return values
