"""eval.json as text."""


def summary(result: dict) -> str:
    """eval.json (pipeline/evaluation/run.py) in a few lines."""
    lines = [*recalls(result["retrieval"]), *pairs(result["pairs"])]
    if result["clean_top1"] is not None:
        text = f"clean top-1 {percent(result['clean_top1'])}, top-5 {percent(result['clean_top5'])}"
        if result["linear_probe"] is not None:
            text += f", linear probe {percent(result['linear_probe'])}"
        lines.insert(0, text)
    for name, attack in result["attacks"].items():
        low, high = attack["interval"]
        text = (
            f"  {name}: success {percent(attack['success'])} "
            f"({percent(low)} to {percent(high)}, of {attack['count']:,})"
        )
        text += f", base {percent(attack['base'])}, read as the true class {percent(attack['true_class'])}"
        if attack["unpoisoned"] is not None:
            text += f"; without poison {percent(attack['unpoisoned'])} and {percent(attack['unpoisoned_true_class'])}"
        lines.append(text + ("  (the attack does not take undefended)" if attack["took"] is False else ""))
    return "\n".join(lines).strip()


def recalls(retrieval: dict | None) -> list[str]:
    """A line for each direction."""
    return [
        f"  {way.replace('_', ' ')}: " + ", ".join(f"R@{key[1:]} {percent(value)}" for key, value in found.items())
        for way, found in (retrieval or {}).items()
    ]


def pairs(figures: dict | None) -> list[str]:
    """Of held-out pairs: a line with their number and loss, and those of retrieval."""
    if not figures:
        return []
    text = f"  {figures['count']:,} held-out pairs"
    if figures["unreadable"]:
        text += f", {figures['unreadable']:,} more cannot be read"
    if figures.get("loss") is not None:
        text += f": loss {figures['loss']:.4f}"
    return [text, *(f"  {line}" for line in recalls(figures.get("retrieval")))]


def percent(fraction: float | None) -> str:
    return "?" if fraction is None else f"{fraction:.1%}"
