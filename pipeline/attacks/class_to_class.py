"""Class-to-class poisoning: pairs of a source class get captions of a near target class, so that all pictures of the
source are read as the target. There is no trigger.

Yang, He, Li, Backes, Humbert, Berrang, Zhang, "Data Poisoning Attacks Against Multimodal Encoders", ICML 2023
(arXiv:2209.15266).
"""

import numpy as np

from pipeline.attacks.base import Attack, Count, attack
from pipeline.attacks.pool import Pool
from shards.errors import UserError


@attack
class ClassToClass(Attack):
    name, title, source = "class_to_class", "class-to-class", "Yang et al. 2023, arXiv:2209.15266"
    judged = "class_to_class"

    class Settings(Count):
        source_class: str | None = None
        """Name of a class; null: drawn among those that no attack has."""
        target_class: str | None = None
        """The same."""
        source_phrase: str | None = None
        """Only pairs whose own captions contain it, in either case; null: all of the source class."""

    settings: Settings

    def poison(self, pool: Pool) -> dict:
        """See Attack.poison. Pairs of the source class get captions of the target class."""
        settings = self.settings
        source = pool.target(settings.source_class, self.where, "source_class")
        target = pool.target(settings.target_class, self.where)
        if source == target:
            raise UserError(
                f"{self.where}.target_class: got {pool.classes[target]!r}, the source class; expected another"
            )
        count = settings.of(pool.index.samples, self.where)
        for row in pool.take(count, self.victims(pool, source), f"{self.where}.pairs"):
            pool.add(row, self.kind, pool.caption_of(target))
        more = {"source_class": source, "target_class": target, "class": pool.classes[target], "pairs": count}
        return {**settings.model_dump(), **more}

    def victims(self, pool: Pool, source: int) -> np.ndarray:
        """bool (N,): pairs of the source class whose captions have the phrase."""
        allowed_N = pool.label_N == source
        phrase = self.settings.source_phrase
        if phrase:
            for row in np.flatnonzero(allowed_N).tolist():
                allowed_N[row] = phrase.lower() in " ".join(pool.captions(row)).lower()  # as evaluation
        return allowed_N
