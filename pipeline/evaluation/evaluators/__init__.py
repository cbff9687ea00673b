"""Evaluators: what is measured of a model after an epoch, and of a finished run, one file each."""

import functools

import torch

from pipeline.config.load import merged
from pipeline.config.schema import Config
from pipeline.evaluation.encoding import Encoder
from pipeline.evaluation.evaluators.attacks import Attacks
from pipeline.evaluation.evaluators.base import Evaluator
from pipeline.evaluation.evaluators.loss import Loss
from pipeline.evaluation.evaluators.retrieval import Retrieval
from pipeline.evaluation.evaluators.zero_shot import ZeroShot
from pipeline.evaluation.held_out import Embedded, HeldOut
from shards.errors import UserError
from shards.index.shard_index import ShardIndex
from shards.samples.overlay import Overlay
from shards.views.batch import Views

REGISTRY: dict[str, type[Evaluator]] = {kind.name: kind for kind in (Loss, Retrieval, ZeroShot, Attacks)}


class Evaluators:
    """The evaluators that a config names, on the data that it holds out. Called with (towers, views, device) by all
    ranks: their figures, the same on every rank.

    data: HeldOut; chosen: the evaluators, in the config's order.
    """

    def __init__(self, config: Config, trained: ShardIndex | None = None, overlay: Overlay | None = None):
        """trained: the index of the training data; overlay: its attacks, or None. Raises UserError where data are
        missing or damaged."""
        self.data, self.workers = HeldOut(config, trained, overlay), config.data.workers
        self.chosen = [kind(self.data) for kind in choose(config.evaluation.evaluators, self.data)]

    def __call__(self, towers: torch.nn.Module, views: Views, device: torch.device) -> dict:
        was_training = towers.training
        towers.eval()
        figures = self.figures(self.embedded(towers, views, device))
        towers.train(was_training)
        return figures

    def embedded(self, towers: torch.nn.Module, views: Views, device: torch.device) -> Embedded:
        """Embeddings of the data by a model in eval mode."""
        return Embedded(Encoder(towers, views, device, workers=self.workers), self.data)

    def figures(self, embedded: Embedded) -> dict:
        """The figures of all evaluators in one mapping. Raises UserError where no picture is left to count."""
        return functools.reduce(merged, (evaluator(embedded) for evaluator in self.chosen), {})

    def line(self, figures: dict) -> str:
        """The figures in one line."""
        return ", ".join(filter(None, (evaluator.line(figures) for evaluator in self.chosen)))


def choose(names: list[str] | None, data: HeldOut) -> list[type[Evaluator]]:
    """The evaluators of these names, or all that `data` allow. Raises UserError for a name that is none, and where
    data are missing."""
    if names is None:
        return [kind for kind in REGISTRY.values() if kind.possible(data)]
    for name in names:
        if name not in REGISTRY:
            raise UserError(f"evaluation.evaluators: got {name!r}, expected any of {', '.join(REGISTRY)}")
        if not REGISTRY[name].possible(data):
            raise UserError(
                f"evaluation.evaluators: {name} needs {REGISTRY[name].needs}; name them, or leave out {name}"
            )
    return [REGISTRY[name] for name in dict.fromkeys(names)]
