"""`safeclip compare`: a table, result.json and a picture of a run of plain CLIP and one of SafeCLIP."""

from itertools import cycle
from pathlib import Path

from pipeline.evaluation.run import read_eval, read_metrics
from shards.errors import UserError
from shards.storage.files import write_json


def compare(clip_run: str | Path, safe_run: str | Path, out: str | Path) -> str:
    """Write OUT/result.json and OUT/result.png of two evaluated runs; returns the table as text. Raises UserError."""
    out = Path(out)
    result = {"clip": read_eval(clip_run), "safeclip": read_eval(safe_run)}
    lacking = [name for name in result["clip"]["attacks"] if name not in result["safeclip"]["attacks"]]
    if lacking:
        raise UserError(
            f"run {safe_run}: its eval.json lacks the attack {lacking[0]}, which that of {clip_run} has; "
            "evaluate both with the same data.overlay"
        )
    write_json(out / "result.json", result)
    draw(result, read_metrics(clip_run), read_metrics(safe_run), out / "result.png")
    return table(result)


def table(result: dict) -> str:
    """Markdown table, percentages: clean accuracy, and per attack its success, base rate and how often the truth is
    read."""
    lines = [
        "| | plain CLIP | SafeCLIP | base rate (SafeCLIP) | read as the true class (CLIP / SafeCLIP) |",
        "|---|---|---|---|---|",
        (
            f"| clean zero-shot top-1 | {percent(result['clip']['clean_top1'])} | "
            f"{percent(result['safeclip']['clean_top1'])} | | |"
        ),
    ]
    for kind, attack in result["clip"]["attacks"].items():
        defended = result["safeclip"]["attacks"][kind]
        note = "" if attack["took"] else " (attack did not take)"
        lines.append(
            f"| {kind} success{note} | {percent(attack['success'])} | {percent(defended['success'])} | "
            f"{percent(defended['base'])} | {percent(attack['true_class'])} / {percent(defended['true_class'])} |"
        )
    views = [f"{result[name]['sample_views']:,}" for name in ("clip", "safeclip")]
    seconds = [f"{result[name]['seconds']:.0f} s" for name in ("clip", "safeclip")]
    lines.append(f"| sample views | {views[0]} | {views[1]} | | |")
    lines.append(f"| training time | {seconds[0]} | {seconds[1]} | | |")
    return "\n".join(lines)


def percent(fraction: float | None) -> str:
    return "?" if fraction is None else f"{fraction:.1%}"


def draw(result: dict, clip_metrics: list[dict], safe_metrics: list[dict], path: Path) -> None:
    """Left: clean accuracy and attack success over steps, of both runs. Right: safe fraction and poison fraction of
    the safe set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    kinds = list(result["clip"]["attacks"])
    shades = cycle(("#d1495b", "#edae49", "#30638e", "#66a182", "C4", "C5", "C6", "C8", "C9"))
    colours = {"clean": "#222222", **dict(zip(kinds, shades))}
    for axis, metrics, title in ((left, clip_metrics, "plain CLIP"), (middle, safe_metrics, "SafeCLIP")):
        found = [(line["step"], line["eval"]) for line in metrics if "eval" in line]
        clean = [(step, figures["clean_top1"]) for step, figures in found if "clean_top1" in figures]
        axis.plot(
            [step for step, _ in clean],
            [100 * accuracy for _, accuracy in clean],
            color=colours["clean"],
            lw=2.5,
            label="clean accuracy",
        )
        for kind in kinds:
            rates = [
                (step, figures["attacks"][kind]["success"])
                for step, figures in found
                if kind in figures.get("attacks", {})
            ]
            axis.plot(
                [step for step, _ in rates],
                [100 * rate for _, rate in rates],
                color=colours[kind],
                lw=1.8,
                marker="o",
                ms=3,
                label=f"{kind} success",
            )
        axis.set(title=title, xlabel="step", ylabel="% of test pictures", ylim=(-3, 103))
        axis.grid(alpha=0.25)
    left.legend(loc="center right", fontsize=9)
    rounds = [line for line in safe_metrics if line["stage"] == "selection"]
    steps = [line["step"] for line in rounds]
    right.plot(
        steps,
        [100 * line["fraction"] for line in rounds],
        color=colours["clean"],
        lw=2.5,
        label="safe fraction of all pairs",
    )
    for kind in kinds:
        fractions = result["safeclip"]["attacks"][kind]["fraction_in_safe_set"]
        right.plot(
            steps[: len(fractions)],  # of a run without poison there are none
            [100 * s for s in fractions],
            color=colours[kind],
            lw=1.8,
            marker="o",
            ms=3,
            label=f"{kind} poison that is in the safe set",
        )
    fractions = result["safeclip"]["poison_in_safe_set"]
    right.plot(
        steps[: len(fractions)],
        [100 * s for s in fractions],
        color="#888888",
        ls="--",
        label="poison fraction in the safe set",
    )
    right.set(title="SafeCLIP's rounds", xlabel="step", ylabel="%", ylim=(-3, 103))
    right.grid(alpha=0.25)
    right.legend(loc="center right", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
