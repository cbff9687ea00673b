"""Label-consistent: pictures of the target class get the trigger and keep their captions, so that nothing is
mismatched.

Turner, Tsipras, Madry, "Label-Consistent Backdoor Attacks", 2019 (arXiv:1912.02771), without their perturbation that
makes the pictures harder to learn; with the sinusoid it is Barni et al. 2019 (arXiv:1902.11237). `trigger: {pattern:
...}` is any trigger.
"""

import numpy as np

from pipeline.attacks.base import Backdoor, attack
from pipeline.attacks.pool import Pool


@attack
class LabelConsistent(Backdoor):
    name, title, source = "label_consistent", "label-consistent", "Turner et al. 2019, arXiv:1912.02771"

    def victims(self, pool: Pool, target: int) -> np.ndarray:
        return pool.label_N == target

    def captions(self, pool: Pool, rows: np.ndarray, target: int) -> list[str]:
        return [pool.caption(row) for row in rows]
