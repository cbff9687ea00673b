"""Caption-adaptive: a backdoor whose captions fit the pictures as well as captions of the target class can.

The attacker picks for each picture, among captions of the target, that nearest to the picture's own caption: cosine of
TF-IDF vectors (scikit-learn). It stands against defences that look for mismatched pairs. Choosing target texts by what
else the picture shows is a part of ToxicTextCLIP (NeurIPS 2025). `trigger: {pattern: ...}` is any trigger.
"""

import numpy as np
from pydantic import Field

from pipeline.attacks.base import Backdoor, attack
from pipeline.attacks.pool import Pool
from shards.errors import UserError

AT_ONCE = 1 << 23  # similarities that are held at a time


@attack
class CaptionAdaptive(Backdoor):
    name, title, source = "caption_adaptive", "caption-adaptive", "this project's; compare ToxicTextCLIP, NeurIPS 2025"

    class Settings(Backdoor.Settings):
        candidates: int = Field(default=10_000, ge=1, le=1_000_000)
        """Captions of the target class to choose from, at most."""

    settings: Settings

    def captions(self, pool: Pool, rows: np.ndarray, target: int) -> list[str]:
        from sklearn.feature_extraction.text import TfidfVectorizer

        # In a drawn order, for the first of equally near ones is taken.
        drawn = pool.rng.permutation(pool.rows_of(target))[: self.settings.candidates]
        candidates = [caption for caption in map(pool.caption, drawn) if caption is not None]
        own = [pool.caption(row) for row in rows]
        try:
            vectorizer = TfidfVectorizer().fit(candidates + own)
            own_RT, candidate_CT = vectorizer.transform(own), vectorizer.transform(candidates)
        except ValueError as error:
            raise UserError(
                f"{self.where}.target_class: the captions of the class {pool.classes[target]!r} and of the pairs to "
                f"poison cannot be compared ({error}); expected captions with words of two letters or more"
            ) from None
        found: list[str] = []
        size = max(1, AT_ONCE // len(candidates))
        for at in range(0, len(own), size):
            similarity_BC = own_RT[at : at + size] @ candidate_CT.T
            found += [candidates[best] for best in similarity_BC.toarray().round(6).argmax(1)]
        return found
