"""What a config holds out for evaluation, and its embeddings by a model. Evaluators share both."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from pipeline.config.schema import Config
from pipeline.evaluation.attack_success import AttackSuccess
from pipeline.evaluation.encoding import Encoder
from pipeline.evaluation.pairs import HeldOutPairs
from pipeline.evaluation.testset import TestSet
from pipeline.evaluation.zero_shot import zero_shot_classifier
from shards.index.shard_index import ShardIndex
from shards.samples.overlay import Overlay


class HeldOut:
    """test: TestSet of evaluation.test; pairs: HeldOutPairs of evaluation.pairs; overlay: the attacks of data.overlay.
    Each is None where the config names none."""

    def __init__(self, config: Config, trained: ShardIndex | None = None, overlay: Overlay | None = None):
        """trained: the index of the training data, which the pairs must not be of. Raises UserError where something is
        missing or damaged."""
        self.test = TestSet(config.evaluation) if config.evaluation.test else None
        self.pairs = HeldOutPairs(config, trained) if config.evaluation.pairs else None
        self.overlay = overlay

    @cached_property
    def attacks(self) -> AttackSuccess | None:
        """The attacks on the test set; None without one of the two. Raises UserError where one cannot be judged."""
        return AttackSuccess(self.test, self.overlay) if self.test and self.overlay else None


@dataclass
class PairEmbeddings:
    """The N pairs that can be read. image_ND, text_UD: float32, unit length; text_N: int64, the number in text_UD of
    each pair's caption. Equal captions are one text. unreadable: number of the pairs left out."""

    image_ND: torch.Tensor
    text_UD: torch.Tensor
    text_N: torch.Tensor
    unreadable: int

    @property
    def counts(self) -> dict:
        return {"count": len(self.image_ND), "unreadable": self.unreadable}


class Embedded:
    """Embeddings of held-out data by a model in eval mode, each made when it is first asked for.

    All ranks ask for the same ones in the same order, and get the same ones.
    """

    def __init__(self, encoder: Encoder, data: HeldOut):
        self.encoder, self.data = encoder, data

    @cached_property
    def image_ND(self) -> torch.Tensor:
        """float32 (N, D), unit length: the test pictures; zeros for one that cannot be read."""
        return self.encoder.pictures(self.data.test.samples, self.data.test.place_N)

    @property
    def readable_N(self) -> np.ndarray:
        """bool (N,): the test pictures that can be read."""
        return self.image_ND.any(1).cpu().numpy()

    @cached_property
    def classes_KD(self) -> torch.Tensor:
        """float32 (K, D), unit length: the classes of the test set."""
        return zero_shot_classifier(self.encoder, self.data.test.classnames, self.data.test.templates)

    @cached_property
    def pairs(self) -> PairEmbeddings:
        """The held-out pairs."""
        pairs, device = self.data.pairs, self.encoder.device
        captioned = [(place, text) for place, text in zip(pairs.place_N, pairs.captions) if text is not None]
        if not captioned:
            none_0D = torch.zeros(0, 1, device=device)
            return PairEmbeddings(none_0D, none_0D, torch.zeros(0, dtype=torch.long, device=device), len(pairs.place_N))
        number = {text: n for n, text in enumerate(dict.fromkeys(text for _, text in captioned))}
        image_ND = self.encoder.pictures(pairs.samples, [place for place, _ in captioned])
        text_N = torch.tensor([number[text] for _, text in captioned], device=device)
        readable_N = image_ND.any(1)
        unreadable = len(pairs.place_N) - int(readable_N.sum())
        return PairEmbeddings(image_ND[readable_N], self.encoder.texts(list(number)), text_N[readable_N], unreadable)

    @cached_property
    def scale(self) -> torch.Tensor:
        """The model's logit scale (1,), the inverse of its temperature, or with a logit bias both (2,)."""
        return self.encoder.scale()
