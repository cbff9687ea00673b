"""Several triggers with one target: each poisoned picture shows one of them, and each of them alone is to work.

The parallel attack of Li, Ma, He, Huang, Jiang, "Multi-Trigger Backdoor Attacks: More Triggers, More Threats", 2024
(arXiv:2401.15295). Several triggers with several targets are several entries of a config.
"""

from pathlib import Path
from typing import ClassVar

from PIL import Image

from pipeline.attacks.base import Backdoor, Trigger, attack, load_trigger, trigger
from pipeline.attacks.pool import Pool
from pipeline.settings import read
from shards.errors import UserError


@trigger
class Several(Trigger):
    """Its variants are other triggers: a list of {pattern: ...} in a config, of Trigger here."""

    pattern: ClassVar[str] = "several"
    triggers: list = []

    @classmethod
    def load(cls, numbers: dict, where: str, folder: str | Path | None) -> "Several":
        found = read(cls, numbers, where)
        triggers = [load_trigger(one, folder, f"{where}.triggers.{n}") for n, one in enumerate(found.triggers)]
        if len(triggers) < 2 or numbers.get("variants", len(triggers)) != len(triggers):
            raise UserError(
                f"{where}.triggers: got {len(triggers)}; expected two or more, and no other number of variants"
            )
        return found.model_copy(update=dict(triggers=triggers, variants=len(triggers)))

    def draw(self, image: Image.Image, variant: int, sample: tuple[int, int]) -> Image.Image:
        return self.triggers[variant].apply(image, sample)

    def fitted(self, pool: Pool, kind: str, target: int) -> "Several":
        fitted = [one.fitted(pool, f"{kind}-{number}", target) for number, one in enumerate(self.triggers)]
        return self.model_copy(update=dict(triggers=fitted))

    def numbers(self) -> dict:
        return {**super().numbers(), "triggers": [one.numbers() for one in self.triggers]}


@attack
class MultiTrigger(Backdoor):
    name, title, source = "multi_trigger", "several triggers", "Li et al. 2024, arXiv:2401.15295"
    pattern = "several"
