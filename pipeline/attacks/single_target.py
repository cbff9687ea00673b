"""Single-target poisoning: each target, a test picture, stands under several captions of one adversarial class.

Carlini, Terzis, "Poisoning and Backdooring Contrastive Learning", ICLR 2022 (arXiv:2106.09667).
"""

import numpy as np
from pydantic import Field

from pipeline.attacks.base import Attack, attack
from pipeline.attacks.pool import Pool
from pipeline.settings import FrozenSection
from shards.errors import UserError


@attack
class SingleTarget(Attack):
    name, title, source = "single_target", "single-target", "Carlini and Terzis 2022, arXiv:2106.09667"
    judged = "single_target"

    class Settings(FrozenSection):
        targets: int = Field(default=10, ge=1, le=10_000)
        """Test pictures, at most all of them."""
        captions: int = Field(default=20, ge=1, le=10_000)
        """Pairs that show one target, each under another pair's caption."""

    settings: Settings

    def poison(self, pool: Pool) -> dict:
        """See Attack.poison. Pairs get a test picture in place of theirs, and captions of a wrong class."""
        if len(pool.classes) < 2:
            raise UserError(
                f"{self.where}: classnames names only {pool.classes}; "
                "an adversarial class is another than the picture's, so name a data set of two or more"
            )
        count = min(self.settings.targets, pool.test.samples)
        targets, anything_N = [], np.ones(pool.index.samples, bool)
        for number in sorted(pool.rng.choice(pool.test.samples, count, replace=False).tolist()):
            true = int(pool.test_label_M[number])
            adversarial = int(pool.rng.choice([c for c in range(len(pool.classes)) if c != true]))
            shard, position = (int(at) for at in pool.test.place(number))
            about = {"true_class": true, "adversarial_class": adversarial}
            targets.append({"shard": shard, "position": position, **about})
            for row in pool.take(self.settings.captions, anything_N, f"{self.where}.captions"):
                pool.add(row, self.kind, pool.caption_of(adversarial), [shard, position])
        return {**self.settings.model_dump(), "pairs": count * self.settings.captions, "targets": targets}
