"""What the section `evaluation` of a config names is there, and can be read."""

from pipeline.config.data import open_overlay
from pipeline.config.schema import Config
from pipeline.doctor.footprint import Findings
from pipeline.doctor.samples import try_samples
from pipeline.evaluation.evaluators import Evaluators
from shards.errors import UserError
from shards.index.shard_index import ShardIndex


def check_evaluation(config: Config, index: ShardIndex) -> Findings:
    """The evaluators, and the data that they need. `index`: of the training data. On one rank of each host."""
    try:
        evaluators = Evaluators(config, index, open_overlay(config.data, index))
        if config.evaluation.labels:
            ShardIndex.load(config.evaluation.labels)
    except UserError as error:
        return [("fatal", "evaluation", str(error))]
    if not evaluators.chosen:
        text = "no evaluator; name held-out pairs with evaluation.pairs=INDEX, or a test set with evaluation.test=DIR"
        return [("ok", "evaluation", text)]
    test, pairs = evaluators.data.test, evaluators.data.pairs
    held_out = [f"{len(test.place_N):,} test pictures"] if test else []
    if pairs:
        held_out.append(f"{len(pairs.place_N):,} of {pairs.samples.index.samples:,} held-out pairs")
    every = config.evaluation.every
    when = ("after every epoch" if every == 1 else f"after every {every} epochs") if every else "after the last epoch"
    names = ", ".join(evaluator.name for evaluator in evaluators.chosen)
    found = [("ok", "evaluation", f"{names} {when}, on {' and '.join(held_out)}")]
    # Without a cache: single samples, not whole shards.
    return found + (try_samples(pairs.samples.scattered(), "evaluation") if pairs else [])
