"""Commands of a run: config, doctor, train, evaluate, compare, export."""

import click

from pipeline.cli.options import COUNT, OVERRIDES, PATH, Command


@click.command(cls=Command)
@click.argument("config", type=PATH, default="paper", metavar="[PRESET|FILE]")
@OVERRIDES
def config(config: str, overrides: tuple[str, ...]) -> None:
    """Print every key of a preset (default: paper) or a file. Shows value, meaning, default and allowed values."""
    from pipeline.config.load import load_config, make_config, override
    from pipeline.config.presets import PRESETS
    from pipeline.config.reference import listing

    if config in PRESETS:
        values = {"preset": config}
        override(values, overrides)
        found = make_config(values)
    else:
        found = load_config(config, overrides)
    print(listing(found))


@click.command(cls=Command)
@click.argument("config", type=PATH)
@OVERRIDES
@click.option("--ranks", type=COUNT, help="processes of the run (default: those that are started here)")
@click.option("--content", is_flag=True, help="read all shards and compare their fingerprints")
def doctor(config: str, overrides: tuple[str, ...], ranks: int | None, content: bool) -> None:
    """Check what a run needs; train nothing. Checks data, config, run directory, disk, memory and network."""
    from pipeline.config.load import load_config

    loaded = load_config(config, overrides)
    from pipeline.distributed import comm
    from pipeline.doctor.checks import examine

    found = examine(loaded, ranks, content)
    if comm.is_rank0():
        for level, about, text in found:
            print(f"{level:8s}{about}: {text.removeprefix(f'{about}: ')}")
    comm.shutdown()
    if any(level == "fatal" for level, *_ in found):
        raise click.exceptions.Exit(2)


@click.command(cls=Command)
@click.argument("config", type=PATH)
@OVERRIDES
@click.option("--dry-run", is_flag=True, help="print plan, schedule, memory and time of a step; train nothing")
def train(config: str, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Train from a config, or resume a run. A run resumes from the newest complete checkpoint of run.dir."""
    if dry_run:
        return tell_plan(config, overrides)
    from pipeline.training.signals import EXIT_CODE, Preempted, StopSignal, ignore

    try:
        # From the first moment: the imports that follow take seconds, minutes on a cluster's file system.
        with StopSignal() as stop:
            from pipeline.config.load import load_config

            loaded = load_config(config, overrides)
            from pipeline.config.data import open_index, open_overlay
            from pipeline.distributed import comm
            from pipeline.evaluation.evaluators import Evaluators
            from pipeline.training.run import train as train_run

            comm.init(loaded.run.timeout)
            evaluators, evaluation = {}, loaded.evaluation
            if evaluation.test or evaluation.pairs or evaluation.evaluators:
                index = open_index(loaded.data)
                found = Evaluators(loaded, index, open_overlay(loaded.data, index))
                evaluators = {"eval": found} if found.chosen else {}
            train_run(loaded, evaluators, stop)
            comm.shutdown()
    except Preempted:  # on all ranks
        ignore()  # one more signal would change the exit code
        comm.shutdown()
        raise click.exceptions.Exit(EXIT_CODE) from None


def tell_plan(config: str, overrides: tuple[str, ...]) -> None:
    """Print what a run of this config would be."""
    from pipeline.config.load import load_config

    loaded = load_config(config, overrides)
    from pipeline.distributed import comm
    from pipeline.doctor.dry_run import dry_run

    for text in dry_run(loaded):
        if comm.is_rank0():
            print(text, flush=True)
    comm.shutdown()


@click.command(cls=Command)
@click.argument("run", type=PATH)
@OVERRIDES
@click.option(
    "--baseline", type=PATH, help="run of plain CLIP on the same poison, whose success decides whether an attack took"
)
@click.option(
    "--unpoisoned",
    type=PATH,
    multiple=True,
    metavar="RUN...",
    help="runs on the same data without poison; reports their mean",
)
def evaluate(run: str, overrides: tuple[str, ...], baseline: str | None, unpoisoned: tuple[str, ...]) -> None:
    """Measure a run's model by the evaluators of its config. Writes RUN/eval.json."""
    from pipeline.evaluation.run import evaluate_run
    from pipeline.evaluation.summary import summary

    print(f"{run}: {summary(evaluate_run(run, baseline, overrides, unpoisoned))}")


@click.command(cls=Command)
@click.argument("clip_run", type=PATH)
@click.argument("safeclip_run", type=PATH)
@click.option("--out", type=PATH, required=True)
def compare(clip_run: str, safeclip_run: str, out: str) -> None:
    """Compare a plain CLIP run and a SafeCLIP run. Prints a table; writes result.json and result.png."""
    from pipeline.evaluation.table import compare as compare_runs

    print(compare_runs(clip_run, safeclip_run, out))


@click.command(cls=Command)
@click.argument("run", type=PATH)
@click.argument("out", type=PATH)
@click.option(
    "--format",
    "form",
    type=click.Choice(["open_clip", "transformers"]),
    default="open_clip",
    help="an open_clip local directory (default), or transformers' CLIPModel with tokenizer and preprocessor",
)
def export(run: str, out: str, form: str) -> None:
    """Write a run's model for open_clip or transformers."""
    from pipeline.config.load import load_run_config
    from pipeline.training.export import export_run

    export_run(run, load_run_config(run), out, form)
    loads = f'open_clip.create_model_and_transforms("local-dir:{out}")'
    print(f"{out}: {loads if form == 'open_clip' else f'transformers.CLIPModel.from_pretrained({out!r})'}")
